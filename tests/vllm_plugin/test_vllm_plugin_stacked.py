from __future__ import annotations

import torch
from tiny import tiny_model

from moe_prism.elastic.executors import EXECUTORS
from moe_prism.elastic.fingerprint import fingerprint, matches
from moe_prism.elastic.selection import Selection
from moe_prism.experts import find_expert_layers
from moe_prism.experts.packing import packed_rows
from moe_prism.vllm_plugin.stacked import GptOssExperts, StackedExperts, split_sub_experts


def test_it_computes_what_the_layer_of_transformers_does() -> None:
    module = find_expert_layers(tiny_model("olmoe"))[0].module
    stacked = StackedExperts(module.gate_up_proj.detach(), module.down_proj.detach())
    x = torch.randn(3, 32)
    selection = Selection(*(torch.tensor(v) for v in ([2, 0, 1], [0, 0, 0], [1, 6, 30])), torch.rand(3))
    run = EXECUTORS.create("reference").run
    assert torch.equal(run(stacked, x, selection, 4), run(module, x, selection, 4))


def test_gpt_oss_computes_what_the_layer_of_transformers_does() -> None:
    module = find_expert_layers(tiny_model("gpt_oss"))[0].module
    weights = module.gate_up_proj.detach(), module.down_proj.detach()
    # vLLM turns the stored weights, and keeps gate and up interleaved
    turned = (weight.transpose(1, 2).contiguous() for weight in weights)
    stacked = GptOssExperts(*turned, module.gate_up_proj_bias.detach(), module.down_proj_bias.detach())
    x = 9 * torch.randn(3, 32)  # so that gate and up are clamped
    assert (x @ weights[0][1]).abs().max() > 2 * module.limit
    selection = Selection(*(torch.tensor(v) for v in ([2, 0, 1], [0, 0, 0], [1, 6, 22])), torch.rand(3))
    run = EXECUTORS.create("reference").run
    torch.testing.assert_close(run(stacked, x, selection, 4), run(module, x, selection, 4), atol=1e-4, rtol=1e-5)
    assert torch.equal(stacked.down_proj_bias, module.down_proj_bias)
    assert matches(stacked, fingerprint(module))
    assert packed_rows(stacked) is not None  # so that the fast kernels take it


def test_parts_of_sub_experts_on_all_ranks_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    experts, hidden, neurons, n, ranks = 3, 8, 24, 4, 2
    gate, up = torch.randn(2, experts, neurons, hidden)
    down = torch.randn(experts, hidden, neurons)
    whole = StackedExperts(torch.cat([gate, up], 1), down)
    x = torch.randn(5, hidden)
    selection = Selection(
        torch.tensor([0, 4, 1, 2]), torch.zeros(4, dtype=torch.int64), torch.tensor([0, 3, 6, 11]), torch.rand(4)
    )
    run = EXECUTORS.create("reference").run
    total = torch.zeros(5, hidden)
    for rank in range(ranks):
        mine = slice(rank * neurons // ranks, (rank + 1) * neurons // ranks)  # what vLLM gives a rank

        def part(weight: torch.Tensor, dim: int, mine: slice = mine) -> torch.Tensor:
            spread = torch.stack([split_sub_experts(w, n, ranks, dim) for w in weight])
            return spread[:, mine] if dim == 0 else spread[:, :, mine]

        ranks_own = StackedExperts(torch.cat([part(gate, 0), part(up, 0)], 1), part(down, 1))
        total += run(ranks_own, x, selection, n)
    torch.testing.assert_close(total, run(whole, x, selection, n))

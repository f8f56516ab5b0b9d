from __future__ import annotations

import pytest
import torch
from test_elastic_executors import layer_of, random_selection

from moe_prism.elastic.executors import EXECUTORS, NeuronRule, choose_executor
from moe_prism.elastic.selection import Selection
from moe_prism.errors import PrismError
from moe_prism.experts.neurons import down, gate_up


def by_hand(module, x: torch.Tensor, selection: Selection, n: int, rule: NeuronRule) -> torch.Tensor:
    """Neuron by neuron, block by block, in Python: knows no rows, groups or kernels."""
    out = torch.zeros_like(x)
    size = module.down_proj.shape[2] // n
    for t in range(len(x)):
        found = []
        for pair in (selection.token == t).nonzero().flatten().tolist():
            expert, part = divmod(int(selection.sub_expert[pair]), n)
            weights = gate_up(module, expert, slice(None))
            half = len(weights) // 2
            for first in range(part * size, (part + 1) * size, rule.block):
                score, value = 0.0, x.new_zeros(x.shape[1])
                for c in range(first, first + rule.block):
                    active = selection.weight[pair] * torch.nn.functional.silu(weights[c] @ x[t])
                    value = value + active * (weights[half + c] @ x[t]) * down(module, expert, slice(c, c + 1))[0]
                    score += float(active.abs() * rule.scale[expert, c])
                found.append((score, value))
        found.sort(key=lambda item: -item[0])
        if rule.count is None:
            kept = [f for f in found if f[0] > rule.threshold]
        else:
            kept = found[: max(1, int(rule.count[t]) // rule.block)]
        out[t] = sum((value for _, value in kept), x.new_zeros(x.shape[1]))
    return out


def rule_of(module, neurons: int, tokens: int, how: object, block: int = 1) -> NeuronRule:
    """A threshold, one count for all, or a list of counts that takes turns."""
    scale = torch.rand(int(module.num_experts), neurons)
    if isinstance(how, float):
        return NeuronRule(scale, threshold=how, block=block)
    counts = how if isinstance(how, list) else [how]
    counts = torch.tensor([counts[t % len(counts)] for t in range(tokens)], dtype=torch.int64)
    return NeuronRule(scale, counts, block=block)


@pytest.mark.parametrize("name", ["cpu", "masked"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("how", [1, 7, 999, [1, 30, 5], 0.05, 1e9])
def test_it_is_the_sum_of_the_kept_neurons(how: object, seed: int, name: str) -> None:
    torch.manual_seed(seed)
    module = layer_of("olmoe", 20, 72)
    x = torch.randn(seed, 72)  # zero tokens among them
    selection = random_selection(seed, 3, 4, int(module.num_experts), "random", seed)
    rule = rule_of(module, 20, seed, how)
    with torch.no_grad():
        found = EXECUTORS.create(name).run_some(module, x, selection, 4, rule)
        torch.testing.assert_close(found, by_hand(module, x, selection, 4, rule), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["cpu", "masked"])
@pytest.mark.parametrize("block", [2, 3, 6])
@pytest.mark.parametrize(("seed", "kind"), [(0, "random"), (1, "random"), (2, "random"), (4, "few experts")])
@pytest.mark.parametrize("how", [1, 7, 999, [1, 30, 5], 0.4, 1e9])
def test_blocks_are_chosen_by_the_sum_of_their_neurons(
    how: object, seed: int, kind: str, block: int, name: str
) -> None:
    torch.manual_seed(seed)
    module = layer_of("olmoe", 24, 40)
    x = torch.randn(seed, 40)
    selection = random_selection(seed, 3, 4, int(module.num_experts), kind, seed)
    rule = rule_of(module, 24, seed, how, block)
    with torch.no_grad():
        found = EXECUTORS.create(name).run_some(module, x, selection, 4, rule)
        torch.testing.assert_close(found, by_hand(module, x, selection, 4, rule), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 4, 5])
def test_a_count_is_rounded_down_to_blocks_but_one_runs(count: int) -> None:
    rule = NeuronRule(torch.ones(2, 16), torch.tensor([count, 16]), block=4)
    assert rule.blocks.tolist() == [1, 4]


@pytest.mark.parametrize("name", ["cpu", "masked"])
def test_all_neurons_are_the_whole_sub_experts(name: str) -> None:
    module = layer_of("olmoe", 32, 64, torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    selection = random_selection(3, 3, 4, int(module.num_experts), "random", 0)
    with torch.no_grad():
        found = EXECUTORS.create(name).run_some(module, x, selection, 4, rule_of(module, 32, 3, 96))
        expected = EXECUTORS.create("reference").run(module.float(), x.float(), selection, 4)
    torch.testing.assert_close(found.float(), expected, atol=5e-2, rtol=2e-2)


@pytest.mark.parametrize("block", [1, 4])
def test_many_tokens_in_bfloat16_keep_the_same_neurons(block: int) -> None:
    torch.manual_seed(0)
    module = layer_of("olmoe", 32, 64, torch.bfloat16)
    x = torch.randn(60, 64).bfloat16()
    selection = random_selection(60, 4, 4, int(module.num_experts), "random", 5)
    rule = rule_of(module, 32, 60, [40, 24, 60], block)
    with torch.no_grad():
        found = EXECUTORS.create("cpu").run_some(module, x, selection, 4, rule).float()
        expected = EXECUTORS.create("masked").run_some(module.float(), x.float(), selection, 4, rule)
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


def test_long_inputs_are_cut_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer_of("olmoe")
    x = torch.randn(11, 32)
    selection = random_selection(11, 3, 4, int(module.num_experts), "random", 0)
    rule = rule_of(module, 16, 11, [3, 9, 1])
    masked = EXECUTORS.create("masked")
    with torch.no_grad():
        whole = masked.run_some(module, x, selection, 4, rule)
        monkeypatch.setattr("moe_prism.elastic.executors.masked._CHUNK", 4)
        torch.testing.assert_close(masked.run_some(module, x, selection, 4, rule), whole)


@pytest.mark.parametrize("name", ["cpu", "masked"])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("how", [2, 0.1])
def test_a_nan_is_not_skipped(how: object, block: int, name: str) -> None:
    module = layer_of("olmoe")
    x = torch.randn(2, 32)
    x[0, 3] = torch.nan
    selection = random_selection(2, 2, 4, int(module.num_experts), "random", 0)
    with torch.no_grad():
        found = EXECUTORS.create(name).run_some(module, x, selection, 4, rule_of(module, 16, 2, how, block))
    assert found[0].isnan().all()
    assert not found[1].isnan().any()


def test_what_is_refused() -> None:
    scale = torch.ones(2, 16)
    for how in ({}, {"count": torch.tensor([3]), "threshold": 0.5}):
        with pytest.raises(PrismError, match="count or threshold"):
            NeuronRule(scale, **how)
    with pytest.raises(PrismError, match="1 or more, got 0"):
        NeuronRule(scale, torch.tensor([2, 0]))
    with pytest.raises(PrismError, match="block must be 1 or more, got 0"):
        NeuronRule(scale, threshold=0.5, block=0)
    module = layer_of("olmoe")
    x, selection = torch.randn(2, 32), random_selection(2, 2, 4, int(module.num_experts), "random", 0)
    for name in ("cpu", "masked"):
        with pytest.raises(PrismError, match="divide the 4 neurons of a sub-expert, got blocks of 8"):
            EXECUTORS.create(name).run_some(module, x, selection, 4, rule_of(module, 16, 2, 8, 8))
    assert type(choose_executor("auto", module, torch.randn(500, 32), 2000, "neurons")).__name__ == "MaskedExecutor"
    for name in ("grouped", "reference"):
        with pytest.raises(PrismError, match="cannot skip neurons"):
            choose_executor(name, module, torch.randn(1, 32), 4, "neurons")


@pytest.mark.parametrize("block", [1, 64])
def test_elsewhere_than_on_a_cpu_nothing_is_chosen_that_was_not_measured(block: int) -> None:
    x = torch.empty(4, 32, device="meta")
    assert type(choose_executor("auto", layer_of("olmoe"), x, 4, "neurons", block=block)).__name__ == "MaskedExecutor"

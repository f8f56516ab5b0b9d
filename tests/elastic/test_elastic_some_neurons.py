from __future__ import annotations

import pytest
import torch
from test_elastic_executors import layer_of, random_selection

from moe_prism.elastic.executors import EXECUTORS, NeuronRule, run_some_neurons
from moe_prism.elastic.selection import Selection
from moe_prism.errors import PrismError
from moe_prism.experts.neurons import down, gate_up


def by_hand(module, x: torch.Tensor, selection: Selection, n: int, rule: NeuronRule) -> torch.Tensor:
    """Neuron by neuron, in Python: knows no rows, groups or kernels."""
    out = torch.zeros_like(x)
    size = module.down_proj.shape[2] // n
    for t in range(len(x)):
        found = []
        for pair in (selection.token == t).nonzero().flatten().tolist():
            expert, part = divmod(int(selection.sub_expert[pair]), n)
            weights = gate_up(module, expert, slice(None))
            half = len(weights) // 2
            for c in range(part * size, (part + 1) * size):
                active = selection.weight[pair] * torch.nn.functional.silu(weights[c] @ x[t])
                value = active * (weights[half + c] @ x[t]) * down(module, expert, slice(c, c + 1))[0]
                found.append((float(active.abs() * rule.scale[expert, c]), value))
        found.sort(key=lambda item: -item[0])
        kept = found[: rule.count] if rule.count is not None else [f for f in found if f[0] > rule.threshold]
        out[t] = sum((value for _, value in kept), torch.zeros(x.shape[1]))
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("how", [{"count": 1}, {"count": 7}, {"count": 999}, {"threshold": 0.05}, {"threshold": 1e9}])
def test_it_is_the_sum_of_the_kept_neurons(how: dict, seed: int) -> None:
    torch.manual_seed(seed)
    module = layer_of("olmoe", 20, 72)
    x = torch.randn(seed, 72)  # zero tokens among them
    selection = random_selection(seed, 3, 4, int(module.num_experts), "random", seed)
    rule = NeuronRule(torch.rand(int(module.num_experts), 20), **how)
    with torch.no_grad():
        found = run_some_neurons(module, x, selection, 4, rule)
        torch.testing.assert_close(found, by_hand(module, x, selection, 4, rule), atol=1e-4, rtol=1e-4)


def test_all_neurons_are_the_whole_sub_experts() -> None:
    module = layer_of("olmoe", 32, 64, torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    selection = random_selection(3, 3, 4, int(module.num_experts), "random", 0)
    rule = NeuronRule(torch.ones(int(module.num_experts), 32), threshold=-1.0)
    with torch.no_grad():
        found = run_some_neurons(module, x, selection, 4, rule)
        expected = EXECUTORS.create("cpu").run(module, x, selection, 4)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("how", [{"count": 2}, {"threshold": 0.1}])
def test_a_nan_is_not_skipped(how: dict) -> None:
    module = layer_of("olmoe")
    x = torch.randn(2, 32)
    x[0, 3] = torch.nan
    selection = random_selection(2, 2, 4, int(module.num_experts), "random", 0)
    rule = NeuronRule(torch.ones(int(module.num_experts), int(module.down_proj.shape[2])), **how)
    with torch.no_grad():
        found = run_some_neurons(module, x, selection, 4, rule)
    assert found[0].isnan().all()
    assert not found[1].isnan().any()


def test_what_it_refuses() -> None:
    module = layer_of("olmoe")
    x = torch.randn(1, 32)
    selection = random_selection(1, 2, 4, int(module.num_experts), "random", 0)
    scale = torch.ones(int(module.num_experts), 16)
    for rule in (NeuronRule(scale), NeuronRule(scale, 3, 0.5)):
        with pytest.raises(PrismError, match="count or threshold"):
            run_some_neurons(module, x, selection, 4, rule)
    with pytest.raises(PrismError, match="1 or more, got 0"):
        run_some_neurons(module, x, selection, 4, NeuronRule(scale, 0))
    with pytest.raises(PrismError, match="not silu"):
        run_some_neurons(layer_of("gpt_oss"), x, selection, 4, NeuronRule(scale, 3))

"""The ladder against a loop over neurons, its bytes against the planes', and what a model does with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import elastic_model, logits
from test_elastic_executors import layer_of, random_selection
from tiny import tiny_model, tokens

import moe_prism
from moe_prism.elastic import budget, dial_of
from moe_prism.elastic.budgets import elastic_layers
from moe_prism.elastic.executors import EXECUTORS
from moe_prism.elastic.ladder import STORED, LadderPlan, Rung, most_scanned, run_ladder, rung_within
from moe_prism.elastic.selection import Selection
from moe_prism.errors import PrismError
from moe_prism.experts.neurons import down, gate_up
from moe_prism.experts.shadow import Planes, Shadow, from_planes, make_shadow

LADDER = {"neurons": "gate-first", "solver": "importance", "shadow_bits": 4}


def by_hand(module, shadow: Shadow, x, selection: Selection, n: int, scale, neurons, raised) -> torch.Tensor:
    """Neuron by neuron, in Python."""
    out = torch.zeros_like(x)
    count = module.down_proj.shape[2]
    size = count // n

    def row(planes: Planes, expert: int, at: int, bits: int) -> torch.Tensor:
        return from_planes(Planes(*(plane[expert, at : at + 1] for plane in planes)), bits)[0]

    for t in range(len(x)):
        found = []
        for pair in (selection.token == t).nonzero().flatten().tolist():
            expert, part = divmod(int(selection.sub_expert[pair]), n)
            for c in range(part * size, (part + 1) * size):
                if raised[t] == STORED:
                    weights = gate_up(module, expert, slice(None))
                    active = torch.nn.functional.silu(weights[c] @ x[t]) * (weights[count + c] @ x[t])
                    out[t] += selection.weight[pair] * active * down(module, expert, slice(c, c + 1))[0]
                    continue
                values = []
                for bits in (4, 8):
                    gate = selection.weight[pair] * torch.nn.functional.silu(
                        row(shadow.gate_up, expert, c, bits) @ x[t]
                    )
                    up = row(shadow.gate_up, expert, count + c, bits) @ x[t]
                    values.append((gate, gate * up, gate * up * row(shadow.down, expert, c, bits)))
                first = float(values[0][0].abs() * scale[expert, c])
                second = float(values[0][1].abs() * shadow.norms[expert, c])
                found.append((first, second, values[0][2], values[1][2]))
        found = sorted(found, key=lambda item: -item[0])[: int(neurons[t])]
        found = sorted(found, key=lambda item: -item[1])
        for place, (_, _, low, high) in enumerate(found):
            out[t] += high if place < int(raised[t]) else low
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "how", [([1] * 4, [0] * 4), ([7] * 4, [3] * 4), ([99] * 4, [99] * 4), ([1, 30, 5], [0, 9, STORED])]
)
def test_it_is_the_sum_of_the_neurons_at_their_bits(how, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(seed)
    module = layer_of("olmoe", 20, 64)
    shadow = make_shadow(module)
    x = torch.randn(seed, 64)  # zero tokens among them
    selection = random_selection(seed, 3, 4, int(module.num_experts), "random", seed)
    scale = torch.rand(int(module.num_experts), 20)
    neurons, raised = (torch.tensor(part[:seed], dtype=torch.int64) for part in how)
    with torch.no_grad():
        expected = by_hand(module, shadow, x, selection, 4, scale, neurons, raised)
        for name, chunk in (("masked", 2048), ("masked", 2), ("cpu", 0)):
            monkeypatch.setattr("moe_prism.elastic.ladder._CHUNK", chunk)
            executor = EXECUTORS.create(name)
            found = run_ladder(module, shadow, x, selection, 4, scale, neurons, raised, executor)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["masked", "cpu"])
def test_a_nan_is_not_skipped(name: str) -> None:
    module = layer_of("olmoe")
    x = torch.randn(2, 32)
    x[0, 3] = torch.nan
    selection = random_selection(2, 2, 4, int(module.num_experts), "random", 0)
    counts = torch.tensor([2, 2]), torch.tensor([1, 1])
    scale = torch.ones(int(module.num_experts), 16)
    with torch.no_grad():
        executor = EXECUTORS.create(name)
        found = run_ladder(module, make_shadow(module), x, selection, 4, scale, *counts, executor)
    assert found[0].isnan().all()
    assert not found[1].isnan().any()


def test_a_few_bfloat16_tokens_and_many_give_the_same() -> None:
    torch.manual_seed(0)
    module = layer_of("olmoe", 32, 64, torch.bfloat16)
    x = torch.randn(6, 64).bfloat16()
    selection = random_selection(6, 3, 4, int(module.num_experts), "random", 0)
    scale, shadow = torch.rand(int(module.num_experts), 32), make_shadow(module)
    counts = torch.tensor([9] * 6), torch.tensor([3] * 6)
    threads = torch.get_num_threads()
    found = []
    try:
        for name, how_many in (("masked", 1), ("cpu", 1), ("cpu", 2)):
            torch.set_num_threads(how_many)
            with torch.no_grad():
                executor = EXECUTORS.create(name)
                found.append(run_ladder(module, shadow, x, selection, 4, scale, *counts, executor))
    finally:
        torch.set_num_threads(threads)
    assert found[0].dtype == torch.bfloat16
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=2e-2, rtol=2e-2)


@given(st.integers(2, 64), st.integers(2, 40), st.sampled_from([0.0, 0.05, 0.4, 1.0]), st.data())
def test_a_rung_is_paid_for_and_leaves_little_over(full: int, size: int, ratio: float, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, full - 1))
    scan = data.draw(st.integers(1, most_scanned(k, full)))
    rung = rung_within(k, scan, size, ratio)
    assert 1 <= rung.neurons <= scan * size
    assert 0 <= rung.raised <= rung.neurons
    read = (scan * size + 2 * rung.neurons) * 4.5 / 16 + 3 * rung.raised * 4 / 16
    assert read <= 3 * k * size + 1e-6
    one_more = 2 * 4.5 / 16 + 3 * 4 / 16
    assert read + 2 * one_more + 1e-6 >= 3 * k * size or rung.raised == scan * size


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return elastic_model("olmoe", tmp_path_factory.mktemp("ladder"), **LADDER, compensation_budgets=2)


def test_full_budget_is_the_original_alone_and_beside_others(model) -> None:
    expected = logits(tiny_model("olmoe"))
    with budget(model, "full"):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    with budget(model, [16, 3]):
        mixed = logits(model)
    torch.testing.assert_close(mixed[0], expected[0], atol=1e-5, rtol=1e-4)
    assert (mixed[1] - expected[1]).abs().max() > 1e-2


def test_mixed_budgets_equal_those_alone(model) -> None:
    ids = tokens(batch=4)
    budgets = [2, 5, 9, 16]
    with torch.no_grad(), budget(model, budgets):
        together = model(ids).logits
    for row, k_active in enumerate(budgets):
        with torch.no_grad(), budget(model, k_active):
            torch.testing.assert_close(model(ids[row : row + 1]).logits[0], together[row], atol=1e-5, rtol=1e-4)


def test_all_neurons_at_eight_bits_are_close_to_the_original(model) -> None:
    with budget(model, 15):
        near = logits(model)
    with budget(model, 3):
        far = logits(model)
    expected = logits(tiny_model("olmoe"))
    assert (near - expected).norm() < 0.1 * (far - expected).norm()


def test_bytes_and_flops_are_counted_apart(model) -> None:
    dial = dial_of(model)
    layer, _ = elastic_layers(model)[0]
    before, size = dial.plan, layer.num_neurons // 4
    try:
        dial.plan = LadderPlan([Rung(12, 20, 6)] * 15, size)
        full = layer.top_k * layer.num_neurons * 3 * layer.hidden_size
        vectors = 2 * layer.top_k * layer.hidden_size
        bits = (12 * size + 2 * 20) * layer.hidden_size * 4.5 + 3 * 6 * layer.hidden_size * 4
        products = (12 * size + 2 * 20 + 2 * 6) * layer.hidden_size
        found = moe_prism.cost_shares(model, 8)
        assert found.bytes == pytest.approx((bits / 16 + vectors) / full)
        assert found.flops == pytest.approx((products + vectors) / full)
        assert moe_prism.cost_shares(model, 16) == (1.0, 1.0)
    finally:
        dial.plan = before
    for k in range(1, 16):
        assert moe_prism.cost_shares(model, k).bytes <= k / 16 + vectors / full + 1e-6


def test_floors_and_the_ladder_go_together(model) -> None:
    with budget(model, 4):
        alone = logits(model)
    with budget(model, 4, k_min=4):
        torch.testing.assert_close(logits(model), alone, atol=1e-5, rtol=1e-4)


def test_what_cannot_have_a_shadow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="not silu"):
        elastic_model("gpt_oss", tmp_path, **LADDER)
    with pytest.raises(PrismError, match="needs neurons: gate-first, got all"):
        elastic_model("olmoe", tmp_path, shadow_bits=4)

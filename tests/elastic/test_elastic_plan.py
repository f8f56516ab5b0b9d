"""How budgets are spent on neurons, what is added back, and what both cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import elastic_model, logits
from tiny import tiny_model, tokens

import moe_prism
from moe_prism import Recipe
from moe_prism.elastic import budget, dial_of, set_budget
from moe_prism.elastic.budgets import elastic_layers
from moe_prism.elastic.compensation import Compensation, OutputScale, Renormalisation, interpolation, recalibration
from moe_prism.elastic.executors import CpuExecutor
from moe_prism.elastic.plan import Plan, most_looked_at, neurons_within
from moe_prism.elastic.selection import Selection
from moe_prism.errors import PrismError
from moe_prism.gates import LayerShape

GATE_FIRST = {"neurons": "gate-first", "solver": "importance", "compensation_budgets": 3}


@given(st.integers(1, 64), st.integers(2, 40), st.data())
def test_a_plan_never_costs_more_than_whole_sub_experts(k_active: int, size: int, data: st.DataObject) -> None:
    scan = data.draw(st.integers(k_active, 3 * k_active - 1))
    neurons = neurons_within(k_active, scan, size)
    assert 1 <= neurons <= scan * size
    rows = scan * size + 2 * neurons
    assert rows <= 3 * k_active * size
    assert rows >= 3 * k_active * size - 1 or neurons == scan * size  # and leaves nothing over


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8), st.data())
def test_blocks_cost_no_more_than_whole_sub_experts_and_one_always_runs(
    k_active: int, block: int, blocks: int, data: st.DataObject
) -> None:
    size = block * blocks
    most = most_looked_at(k_active, size, block)
    scan = data.draw(st.integers(k_active, most))
    neurons = neurons_within(k_active, scan, size, block)
    assert block <= neurons <= scan * size
    assert neurons % block == 0
    assert scan * size + 2 * neurons <= 3 * k_active * size  # gate rows, up and down rows
    assert scan * size + 2 * (neurons + block) > 3 * k_active * size or neurons == scan * size
    assert (most + 1) * size + 2 * block > 3 * k_active * size  # looking at one more leaves too little for a block
    assert neurons_within(k_active, k_active, size, block) == k_active * size


def test_interpolation_is_linear_and_ends_at_zero() -> None:
    shares = interpolation([2, 6], 8)
    assert shares.tolist()[1:] == [[1, 0], [1, 0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0, 1], [0, 0.5], [0, 0]]


def test_vectors_are_fp32_whatever_dtype_a_model_is_loaded_in() -> None:
    expected = Compensation(torch.ones(2, 5, 3), [2, 6], 9).shares
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it loads one
    try:
        found = Compensation(torch.ones(2, 5, 3, dtype=torch.float32), [2, 6], 9)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.shares, expected)  # dtypes, too
    out = torch.zeros(1, 3, dtype=torch.bfloat16)
    index, weights = torch.tensor([[0, 4]]), torch.rand(1, 2)
    found.apply(out, index, weights, torch.tensor([3]), Selection(*(torch.zeros(0).long(),) * 4))


def test_compensation_adds_weighted_vectors_of_the_routed_experts() -> None:
    torch.manual_seed(0)
    vectors = torch.randn(2, 5, 3)
    index, weights = torch.tensor([[0, 4], [2, 1]]), torch.rand(2, 2)
    found = Compensation(vectors, [2, 6], 8).of(index, weights, torch.tensor([3, 7]))
    first = 0.75 * vectors[0] + 0.25 * vectors[1]
    torch.testing.assert_close(found[0], weights[0, 0] * first[0] + weights[0, 1] * first[4])
    torch.testing.assert_close(found[1], weights[1, 0] * vectors[1, 2] / 2 + weights[1, 1] * vectors[1, 1] / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_compensation_applied_is_the_output_and_what_is_added(tokens: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = Compensation(torch.randn(3, 5, 6), [2, 4, 6], 8)
    out, weights = torch.randn(tokens, 6).to(dtype), torch.rand(tokens, 2).to(dtype)
    index, budgets = torch.randint(5, (tokens, 2)), torch.randint(1, 9, (tokens,))
    found = given.apply(out, index, weights, budgets, NOTHING)
    assert found.dtype == dtype
    torch.testing.assert_close(found, (out.float() + given.of(index, weights, budgets)).to(dtype))
    learning = given.apply(out.float().requires_grad_(), index, weights, budgets, NOTHING)
    assert learning.requires_grad
    torch.testing.assert_close(learning.to(dtype), found, rtol=1e-2, atol=1e-2)


def test_scale_and_shift_are_interpolated_towards_nothing() -> None:
    torch.manual_seed(0)
    vectors, out = torch.randn(2, 2, 3), torch.randn(3, 3)
    scaled = OutputScale(vectors, [2, 6], 8)
    nothing = torch.zeros(3, 1)
    found = scaled.apply(out, nothing.long(), nothing, torch.tensor([3, 7, 8]), NOTHING)
    first = 0.75 * vectors[0] + 0.25 * vectors[1]
    torch.testing.assert_close(found[0], out[0] * (1 + first[0]) + first[1])
    torch.testing.assert_close(found[1], out[1] * (1 + vectors[1, 0] / 2) + vectors[1, 1] / 2)
    assert torch.equal(found[2], out[2])


NOTHING = Selection(*(torch.zeros(0, dtype=torch.int64) for _ in range(4)))


def test_renormalised_weights_are_those_of_a_router_with_fewer_experts(tmp_path: Path) -> None:
    """A gate that follows the router, at multiples of N, runs top-k' experts: transformers renormalises them itself."""
    theirs = tiny_model("qwen3_moe")  # norm_topk_prob
    ours = elastic_model("qwen3_moe", tmp_path, gate="linear", recalibration="renormalise")
    for k in (1, 2, 3):
        with moe_prism.elastic.routed_experts(theirs, k), budget(ours, 4 * k):
            torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)


def test_renormalisation_leaves_a_token_that_runs_all_experts_alone() -> None:
    out, index, weights = torch.randn(2, 3), torch.tensor([[0, 4], [2, 1]]), torch.tensor([[0.1, 0.3], [0.3, 0.2]])
    ran = Selection(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 1, 0]), *NOTHING[2:])
    found = Renormalisation().apply(out, index, weights, torch.tensor([3, 1]), ran)
    assert torch.equal(found[0], out[0])
    torch.testing.assert_close(found[1], out[1] * 0.5 / 0.3)


def test_costs_of_recalibration_by_hand() -> None:
    shape = LayerShape(num_experts=64, num_neurons=1024, hidden_size=2048, top_k=8, num_sub_experts=4)
    fitted = torch.zeros(1, 2, 2048)
    assert recalibration("mean", fitted, [3], 32).cost(shape) == (2 * 2 * 8 * 2048, 2 * 8 * 2048)
    assert recalibration("scale", fitted, [3], 32).cost(shape) == (2 * 4 * 2048, 4 * 2048)
    assert recalibration("renormalise", None, [], 32).cost(shape) == (2064, 0)
    assert recalibration("mean", None, [], 32) is None
    with pytest.raises(PrismError, match="one of mean, scale, renormalise, got 'median'"):
        recalibration("median", None, [], 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    return elastic_model("olmoe", tmp_path_factory.mktemp("gate_first"), **GATE_FIRST)


def test_full_budget_is_the_original(model) -> None:
    with budget(model, "full"):
        torch.testing.assert_close(logits(model), logits(tiny_model("olmoe")), atol=1e-5, rtol=1e-5)


def test_mixed_budgets_equal_those_alone(model) -> None:
    ids = tokens()
    budgets = [(2, 5, 9, 16)[row % 4] for row in range(len(ids))]
    with torch.no_grad(), budget(model, budgets):
        together = model(ids).logits
    for row, k_active in enumerate(budgets):
        with torch.no_grad(), budget(model, k_active):
            torch.testing.assert_close(model(ids[row : row + 1]).logits[0], together[row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("k_active", [2, 7, 12])
def test_executors_agree(model, k_active: int) -> None:
    dial = dial_of(model)
    found = []
    try:
        for name in ("cpu", "masked"):
            dial.executor = name
            with budget(model, k_active):
                found.append(logits(model))
        dial.executor = "grouped"
        with budget(model, k_active), pytest.raises(PrismError, match="cannot skip neurons"):
            logits(model)
    finally:
        dial.executor = "auto"
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_the_cost_counts_gates_neurons_and_vectors(model) -> None:
    dial = dial_of(model)
    layer, _ = elastic_layers(model)[0]
    before = dial.plan
    try:
        scan = list(range(1, 17))
        scan[7] = 12
        size = layer.num_neurons // 4
        dial.plan = Plan(scan, size)
        neurons = (3 * 8 - 12) * size // 2
        vectors = 2 * layer.top_k * layer.hidden_size
        expected = ((12 * size + 2 * neurons) * layer.hidden_size + vectors) / (
            layer.top_k * layer.num_neurons * 3 * layer.hidden_size
        )
        assert moe_prism.cost_shares(model, 8) == pytest.approx((expected, expected))
        assert moe_prism.cost_shares(model, 16) == (1.0, 1.0)
    finally:
        dial.plan = before


@pytest.fixture(scope="module")
def blocks_of_2(tmp_path_factory: pytest.TempPathFactory):
    return elastic_model("olmoe", tmp_path_factory.mktemp("blocks"), **GATE_FIRST | {"neuron_block": 2})


def test_blocks_reach_plan_and_cost(blocks_of_2) -> None:
    dial = dial_of(blocks_of_2)
    layer, _ = elastic_layers(blocks_of_2)[0]
    before, scan, size = dial.plan, list(range(1, 17)), layer.num_neurons // 4
    assert before.block == 2
    assert not (before.neurons % 2).any()
    try:
        scan[6] = 10
        dial.plan = Plan(scan, size, 4)
        neurons = 20  # 84 rows are paid, 40 are gate rows: 22 neurons, in blocks of 4
        vectors = 2 * layer.top_k * layer.hidden_size
        expected = ((10 * size + 2 * neurons) * layer.hidden_size + vectors) / (
            layer.top_k * layer.num_neurons * 3 * layer.hidden_size
        )
        assert moe_prism.cost_shares(blocks_of_2, 7) == pytest.approx((expected, expected))
    finally:
        dial.plan = before


@pytest.mark.parametrize("k_active", [1, 5, 9])
def test_executors_agree_on_blocks(blocks_of_2, k_active: int) -> None:
    dial, found = dial_of(blocks_of_2), []
    before = dial.plan
    try:
        dial.plan = Plan([max(k, min(16, 2 * k)) for k in range(1, 17)], before.size, 2)
        for name in ("cpu", "masked"):
            dial.executor = name
            with budget(blocks_of_2, k_active):
                found.append(logits(blocks_of_2))
        dial.plan = Plan([max(k, min(16, 2 * k)) for k in range(1, 17)], before.size)
        with budget(blocks_of_2, k_active):
            single = logits(blocks_of_2)
    finally:
        dial.executor, dial.plan = "auto", before
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[0], single, atol=1e-3)  # blocks are another choice


def test_full_budget_with_blocks_is_the_original(blocks_of_2) -> None:
    with budget(blocks_of_2, "full"):
        torch.testing.assert_close(logits(blocks_of_2), logits(tiny_model("olmoe")), atol=1e-5, rtol=1e-5)


def test_floors_and_neurons_go_together(model) -> None:
    with budget(model, 8):
        alone = logits(model)
    set_budget(model, 8, k_min=8)  # everybody is sure of everything, so nothing changes
    try:
        torch.testing.assert_close(logits(model), alone, atol=1e-5, rtol=1e-4)
    finally:
        set_budget(model, "full")


def test_a_lone_token_looks_at_its_floor_only(model, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    real = CpuExecutor.run_some

    def spy(self, module, x, selection, n, rule):
        looked.append(len(selection.token))
        return real(self, module, x, selection, n, rule)

    monkeypatch.setattr(CpuExecutor, "run_some", spy)
    dial = dial_of(model)
    before, scan = dial.plan, [min(16, 2 * k) for k in range(1, 17)]
    try:
        dial.plan = Plan(scan, elastic_layers(model)[0][0].num_neurons // 4)
        with torch.no_grad(), budget(model, 7, k_min=3):
            model(tokens()[:1, :1])
    finally:
        dial.plan = before
    assert looked == [scan[2]] * len(elastic_layers(model))


def test_what_cannot_skip_neurons_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="not silu"):
        elastic_model("gpt_oss", tmp_path, **GATE_FIRST)
    with pytest.raises(PrismError, match="gate 'proxy' computes neurons"):
        elastic_model("olmoe", tmp_path, **GATE_FIRST | {"gate": "proxy"})


@pytest.mark.parametrize(
    ("family", "changes", "skips"),
    [
        ("olmoe", {}, True),
        ("gpt_oss", {}, False),
        ("olmoe", {"gate": "linear"}, False),
        ("olmoe", {"gate": "proxy"}, False),
        ("olmoe", {"fold": True}, False),
    ],
)
def test_by_default_neurons_are_skipped_where_they_can_be(
    family: str, changes: dict[str, Any], skips: bool, tmp_path: Path
) -> None:
    default = Recipe().model_dump(include={"solver", "gate", "neurons"})
    model = elastic_model(family, tmp_path, **default | changes)
    assert (dial_of(model).plan is not None) == skips

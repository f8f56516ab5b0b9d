"""Step times: the terms from first principles, fits on steps whose coefficients are known, files and their refusals."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling_samples import FULL, SECONDS, SUB_EXPERTS, cost_model

from moe_prism.errors import PrismError
from moe_prism.scheduling import CostModel, StepLoad
from moe_prism.scheduling.cost_model import TERMS, errors, fit, fit_held_out, fit_memory

COST = cost_model()
budgets = st.lists(st.integers(1, FULL), max_size=6)


def by_hand(decode: list[int], context: float, pieces: list[tuple[int, int, int]], cap: int | None = None) -> float:
    """Seconds of a step, token by token: (tokens, budget, start) of every piece."""
    s, total = SECONDS, SECONDS["step"]
    for k in decode:
        total += s["decode_tokens"] + s["decode_work"] * k / FULL
    for tokens, k, start in pieces:
        for position in range(start, start + tokens):
            total += s["prefill_tokens"] + s["prefill_work"] * k / FULL + s["prefill_context"] * (position + 1)
    if decode:
        touched = 1 - math.prod(1 - k / SUB_EXPERTS for k in decode)
        if cap is not None:
            touched = min(touched, cap / SUB_EXPERTS)
        total += s["decode_step"] + s["touched"] * touched + s["context"] * context
    total += s["prefill_step"] if pieces else 0.0
    if any(k < FULL for k in decode):
        total += s["gated"] + s["gated_tokens"] * len(decode)
    if any(k < FULL for _, k, _ in pieces):
        total += s["gated"] + s["gated_tokens"] * sum(tokens for tokens, _, _ in pieces)
    return total


@settings(max_examples=100)
@given(
    decode=budgets,
    context=st.floats(0, 1e4),
    pieces=st.lists(st.tuples(st.integers(1, 30), st.integers(1, FULL), st.integers(0, 50)), max_size=3),
    cap=st.one_of(st.none(), st.integers(1, SUB_EXPERTS)),
)
def test_a_step_is_the_sum_of_its_terms(decode, context, pieces, cap) -> None:
    tokens, ks, starts = (list(part) for part in zip(*pieces, strict=True)) if pieces else ([], [], [])
    load = COST.load(decode, context, tokens, ks, starts, cap)
    assert COST.seconds(load) == pytest.approx(by_hand(decode, context, pieces, cap), rel=1e-9)


@given(batch=st.integers(1, 12), k=st.integers(1, FULL), context=st.floats(0, 1e3))
def test_the_papers_table_is_a_view_of_it(batch: int, k: int, context: float) -> None:
    assert COST.table(batch, k, context) == pytest.approx(by_hand([k] * batch, context * batch, []), rel=1e-9)


@settings(max_examples=60)
@given(decode=st.lists(budgets.filter(len), min_size=1, max_size=3), context=st.floats(0, 1e3))
def test_curves_agree_with_single_steps(decode, context) -> None:
    width = min(map(len, decode))
    rows = np.array([row[:width] for row in decode])
    overhead = COST.step_overhead(prompts=False)
    for row, seconds in zip(rows.tolist(), COST.decode_curve(rows, context), strict=True):
        assert seconds + overhead == pytest.approx(by_hand(row, context, []))
    contexts = np.linspace(1, 9, width)
    for count, seconds in enumerate(COST.decode_growth(rows[0], contexts), 1):
        wanted = by_hand(rows[0][:count].tolist(), float(contexts[:count].sum()), [])
        assert seconds + overhead == pytest.approx(wanted)


def test_prompts_agree_with_single_steps() -> None:
    curve = COST.prefill_curve(np.array([5.0, 7.0]), np.array([0.0, 3.0]), np.array([[2, 2], [FULL, FULL]]))
    gate = SECONDS["gated"]
    for k, seconds in ((2, curve[0]), (FULL, curve[1])):
        whole = by_hand([], 0, [(5, k, 0), (7, k, 3)])
        extra = 0.0 if k < FULL else gate  # the overhead counts a gate whether or not it runs
        assert seconds.sum() + COST.step_overhead(prompts=True) == pytest.approx(whole + extra)
    pieces = sum(by_hand([], 0, [(tokens, 3, start)]) for tokens, start in ((4, 0), (4, 4), (2, 8)))
    assert COST.prefill_seconds(10, 3, 4) == pytest.approx(pieces)


def steps(rng: np.random.Generator, count: int) -> list[StepLoad]:
    found = []
    for _ in range(count):
        decode = rng.integers(1, FULL + 1, rng.integers(0, 20)).tolist()
        prompts = rng.integers(1, 200, rng.integers(0 if decode else 1, 4))
        ks = rng.integers(1, FULL + 1, len(prompts))
        starts = rng.integers(0, 300, len(prompts))
        if rng.random() < 0.3:
            decode, ks = [FULL] * len(decode), np.full(len(prompts), FULL)
        found.append(COST.load(decode, float(len(decode) * rng.integers(1, 500)), prompts, ks, starts))
    return found


def test_a_fit_finds_the_coefficients_and_knows_its_errors() -> None:
    rng = np.random.default_rng(0)
    loads = steps(rng, 200)
    exact = [COST.seconds(load) for load in loads]
    assert fit(loads, exact) == pytest.approx(COST.coefficients, rel=1e-3, abs=1e-9)
    noisy = [seconds * float(rng.uniform(0.9, 1.1)) for seconds in exact]
    model = fit_held_out(loads, noisy, seed=3, full_budget=FULL, sub_experts=SUB_EXPERTS, engine="e")
    assert all(c >= 0 for c in model.coefficients)
    held_out = [m for m in model.measured if m.held_out]
    assert len(held_out) == 50
    again = errors(model, [m.load for m in held_out], [m.seconds for m in held_out])
    assert (model.median_error, model.p95_error) == again
    assert 0.02 < model.median_error < 0.08
    assert 0.05 < model.p95_error < 0.15
    fitted = [m for m in model.measured if not m.held_out]
    assert model.coefficients == fit([m.load for m in fitted], [m.seconds for m in fitted])
    assert model == fit_held_out(loads, noisy, seed=3, full_budget=FULL, sub_experts=SUB_EXPERTS, engine="e")
    other = fit_held_out(loads, noisy, seed=4, full_budget=FULL, sub_experts=SUB_EXPERTS)
    assert [m.held_out for m in other.measured] != [m.held_out for m in model.measured]


def test_memory_is_fixed_and_per_token() -> None:
    tokens = [0, 100, 1000, 5000]
    assert fit_memory(tokens, [2_000_000 + 512 * t for t in tokens]) == (2_000_000, 512)
    model = cost_model()
    model = CostModel(model.coefficients, FULL, SUB_EXPERTS, token_bytes=512, fixed_bytes=2_000_000)
    assert model.memory_bytes(1000) == 2_512_000
    with pytest.raises(PrismError, match="two different numbers"):
        fit_memory([5, 5], [1, 2])


@pytest.mark.parametrize(
    ("loads", "seconds", "message"),
    [
        ([StepLoad()] * 3, [1.0] * 3, f"at least {len(TERMS)} measured steps"),
        ([StepLoad()] * 20, [1.0] * 19, "20 steps and 19 times"),
        ([StepLoad()] * 20, [1.0] * 19 + [0.0], "above 0 seconds, got 0.0"),
    ],
)
def test_a_fit_refuses(loads, seconds, message) -> None:
    with pytest.raises(PrismError, match=message):
        fit(loads, seconds)


@pytest.mark.parametrize(
    "coefficients", [(1.0,) * 3, (0.0,) * len(TERMS), (-1.0,) + (1.0,) * (len(TERMS) - 1), (math.nan,) * len(TERMS)]
)
def test_impossible_coefficients(coefficients) -> None:
    with pytest.raises(PrismError, match="profile-cost"):
        CostModel(coefficients, FULL, SUB_EXPERTS)


def test_json_there_and_back() -> None:
    loads = steps(np.random.default_rng(1), 40)
    model = fit_held_out(loads, [COST.seconds(load) for load in loads], full_budget=FULL, sub_experts=SUB_EXPERTS)
    assert CostModel.from_dict(json.loads(json.dumps(model.to_dict()))) == model


def damaged(change) -> dict:
    record = cost_model().to_dict()
    change(record)
    return record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(version=2), "version must be 1, got 2"),
        (lambda r: r.pop("version"), "version must be 1, got None"),
        (lambda r: r["coefficients"].pop("touched"), "damaged"),
        (lambda r: r["coefficients"].update(more=1), "damaged"),
        (lambda r: r["coefficients"].update(touched="x"), "damaged"),
        (lambda r: r["coefficients"].update(touched=-1), "none negative"),
        (lambda r: r.pop("full_budget"), "damaged"),
        (lambda r: r.update(more=1), "damaged"),
        (lambda r: r.update(measured=[{"seconds": 1}]), "damaged"),
    ],
)
def test_a_damaged_record_is_refused(change, message) -> None:
    with pytest.raises(PrismError, match=message):
        CostModel.from_dict(damaged(change))


def test_scheduling_imports_no_torch() -> None:
    code = "import moe_prism.scheduling, moe_prism.scheduling.simulator, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

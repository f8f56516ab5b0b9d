"""Step times: the terms from first principles, and the views of them."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling_samples import FULL, SECONDS, SUB_EXPERTS, cost_model

from moe_prism.errors import PrismError
from moe_prism.scheduling import CostModel
from moe_prism.scheduling.step_load import TERMS

COST = cost_model()
budgets = st.lists(st.integers(1, FULL), max_size=6)


def by_hand(decode: list[int], context: float, pieces: list[tuple[int, int, int]], cap: int | None = None) -> float:
    """Seconds of a step, token by token: (tokens, budget, start) of every piece."""
    s, total = SECONDS, SECONDS["step"]
    decode_gated, prompts_gated = any(k < FULL for k in decode), any(k < FULL for _, k, _ in pieces)
    for k in decode:
        total += s["decode_tokens"] + s["decode_work"] * k / FULL
        if decode_gated:
            total += s["gated_tokens"] + s["decode_low"] * min(k / FULL, 0.25)
    for tokens, k, start in pieces:
        for position in range(start, start + tokens):
            total += s["prefill_tokens"] + s["prefill_work"] * k / FULL + s["prefill_context"] * (position + 1)
            if prompts_gated:
                total += s["gated_tokens"] + s["prefill_low"] * min(k / FULL, 0.25)
    untouched = math.prod(1 - k / SUB_EXPERTS for k in decode)
    if cap is not None and decode:
        untouched = max(untouched, 1 - cap / SUB_EXPERTS)
    total += s["touched"] * (1 - untouched * math.prod((1 - k / SUB_EXPERTS) ** tokens for tokens, k, _ in pieces))
    total += s["decode_step"] + s["context"] * context if decode else 0.0
    total += s["prefill_step"] if pieces else 0.0
    total += s["prefill_first"] * min(256, sum(tokens for tokens, _, _ in pieces))
    total += s["several"] * (len(decode) + sum(tokens for tokens, _, _ in pieces) > 1)
    return total + s["gated"] * (decode_gated or prompts_gated)


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
    counts = np.arange(1, width + 1)
    for row, seconds in zip(rows.tolist(), COST.decode_curve(rows, context, counts=counts), strict=True):
        assert seconds + overhead == pytest.approx(by_hand(np.repeat(row, counts).tolist(), context, []))
    contexts = np.linspace(1, 9, width)
    for count, seconds in enumerate(COST.decode_growth(rows[0], contexts), 1):
        wanted = by_hand(rows[0][:count].tolist(), float(contexts[:count].sum()), [])
        assert seconds + overhead == pytest.approx(wanted)


def test_prompts_agree_with_single_steps() -> None:
    tokens, starts = np.array([50.0, 70.0]), np.array([0.0, 3.0])
    curve = COST.prefill_curve(tokens, starts, np.array([[2, 2], [FULL, FULL]]))
    for k, seconds in ((2, curve[0]), (FULL, curve[1])):
        whole = by_hand([], 0, [(50, k, 0), (70, k, 3)])
        extra = 0.0 if k < FULL else SECONDS["gated"]  # the overhead counts a gate whether or not it runs
        extra += SECONDS["touched"] * (1 - k / SUB_EXPERTS) ** 120  # and every sub-expert
        assert seconds.sum() + COST.step_overhead(prompts=True) == pytest.approx(whole + extra)
    beside = COST.decode_curves(np.array([[3, 5]]), 40.0)[1][0] + curve[0].sum()
    untouched = (1 - 3 / SUB_EXPERTS) * (1 - 5 / SUB_EXPERTS) * (1 - 2 / SUB_EXPERTS) ** 120
    together = by_hand([3, 5], 40.0, [(50, 2, 0), (70, 2, 3)]) + SECONDS["touched"] * untouched
    assert beside + COST.step_overhead(prompts=True) == pytest.approx(together)
    pieces = sum(by_hand([], 0, [(tokens, 3, start)]) for tokens, start in ((4, 0), (4, 4), (2, 8)))
    assert COST.prefill_seconds(10, 3, 4) == pytest.approx(pieces)


@pytest.mark.parametrize(
    "coefficients", [(1.0,) * 3, (0.0,) * len(TERMS), (-1.0,) + (1.0,) * (len(TERMS) - 1), (math.nan,) * len(TERMS)]
)
def test_impossible_coefficients(coefficients) -> None:
    with pytest.raises(PrismError, match="profile-cost"):
        CostModel(coefficients, FULL, SUB_EXPERTS)


def test_scheduling_imports_no_torch() -> None:
    code = "import moe_prism.scheduling, moe_prism.scheduling.simulator, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0

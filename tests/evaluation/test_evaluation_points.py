"""Distinct and stable against scipy's paired t statistic and against cases worked out by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from moe_prism.checkpoint.schema import parse_operating_points
from moe_prism.errors import PrismError
from moe_prism.evaluation.points import (
    Cost,
    Further,
    Measured,
    Provenance,
    RunResult,
    build_operating_points,
    distinct,
    paired_difference,
    stable,
)


def series(means: dict[int, float], noise: float = 0.0, own: float = 0.01, tokens: int = 400) -> dict[int, RunResult]:
    """Losses with the given means: a part common to all budgets (``noise``) and a part of each budget's own."""
    rng = np.random.default_rng(0)
    common = rng.normal(0, noise, tokens)
    out = {}
    for budget, mean in means.items():
        mine = rng.normal(0, own, tokens)
        loss = (mean + common - common.mean() + mine - mine.mean()).astype(np.float32)
        out[budget] = RunResult(loss, kl=0.5 / budget, top1_agreement=1 - 0.1 / budget)
    return out


def test_pairing_removes_what_is_common_to_both() -> None:
    # unpaired, a difference of 0.01 drowns in token losses that spread by 3 nats
    made = series({1: 4.01, 2: 4.0}, noise=3.0)
    assert distinct(made) == {1: True, 2: True}
    mean, error = paired_difference(made[1].nll, made[2].nll)
    assert mean == pytest.approx(0.01, abs=1e-4)
    assert error == pytest.approx(0.01 * 2**0.5 / 400**0.5, rel=0.15)


@given(
    st.lists(
        st.lists(st.floats(0, 10, width=32), min_size=6, max_size=6).filter(lambda x: len(set(x)) == 6),
        min_size=2,
        max_size=5,
    )
)
def test_distinct_is_twice_the_paired_t_statistic(losses: list[list[float]]) -> None:
    made = {k: RunResult(np.array(x, np.float32), 0.0, 1.0) for k, x in enumerate(losses, start=1)}
    separated = {}
    for low, high in pairwise(sorted(made)):
        difference = made[low].nll.astype(float) - made[high].nll.astype(float)
        if np.ptp(difference) == 0:  # scipy has no statistic for a constant difference
            separated[low, high] = bool(difference[0] > 0)
        else:
            separated[low, high] = bool(stats.ttest_1samp(difference, 0).statistic > 2)
    for budget, answer in distinct(made).items():
        assert answer == all(held for pair, held in separated.items() if budget in pair)


def test_both_neighbours_count_and_the_direction_matters() -> None:
    # 2 and 3 are equal in mean; 4 is far better; 5 is far worse again
    made = series({1: 5.0, 2: 4.5, 3: 4.5, 4: 4.0, 5: 4.3})
    assert distinct(made) == {1: True, 2: False, 3: False, 4: False, 5: False}


def test_neighbours_are_adjacent_measured_budgets() -> None:
    made = series({1: 5.0, 2: 5.0, 4: 4.0})
    assert not distinct(made)[1]
    assert distinct({k: made[k] for k in (1, 4)}) == {1: True, 4: True}
    assert distinct({4: made[4]}) == {4: True}  # the only point has no neighbour to be confused with


def test_identical_losses_are_not_distinct() -> None:
    loss = np.ones(50, np.float32)
    assert distinct({1: RunResult(loss, 0, 1), 2: RunResult(loss.copy(), 0, 1)}) == {1: False, 2: False}


def test_one_token_separates_nothing() -> None:
    made = {k: RunResult(np.array([9.0 - k], np.float32), 0, 1) for k in (1, 2)}
    assert distinct(made) == {1: False, 2: False}


def test_stable_asks_for_the_order_only_but_everywhere() -> None:
    barely = series({1: 5.002, 2: 5.001, 3: 5.0}, own=1.0)  # right order, far from significant
    swapped = series({1: 5.0, 2: 4.0, 3: 4.1})
    assert distinct(barely) == {1: False, 2: False, 3: False}
    assert stable([1, 2, 3], [barely]) == {1: True, 2: True, 3: True}
    assert stable([1, 2, 3], [barely, swapped]) == {1: True, 2: False, 3: False}
    assert stable([1, 2, 3], [barely, None]) == {1: None, 2: None, 3: None}
    assert stable([1, 2, 3], []) == {1: None, 2: None, 3: None}


def test_stable_needs_the_same_budgets() -> None:
    with pytest.raises(PrismError, match=r"\[1, 2\], got \[1, 2, 3\]"):
        stable([1, 2], [series({1: 3, 2: 2, 3: 1})])


def test_losses_of_different_texts_cannot_be_paired() -> None:
    with pytest.raises(PrismError, match="same text"):
        paired_difference(np.zeros(3, np.float32), np.zeros(4, np.float32))


def test_operating_points_hold_what_was_measured_and_survive_json() -> None:
    elastic = series({1: 5.0, 2: 4.5, 3: 4.5, 4: 4.0})
    costs = {k: Cost(flops=k / 4 + 0.01, bytes=k / 4 + 0.02) for k in elastic}
    second_text = series({1: 6.0, 2: 5.9, 3: 5.8, 4: 5.7})
    second_seed = series({1: 5.0, 2: 4.9, 3: 4.8, 4: 4.0})
    baseline = series({1: 4.8, 2: 4.0})
    points = build_operating_points(
        full_budget=4,
        top_k=2,
        elastic=Measured(elastic, costs),
        baseline=baseline,
        provenance=Provenance("a text", 7, {"torch": "2"}, {"cores": 2}),
        further=Further("another", 8, second_text, series({1: 6.0, 2: 5.0}), second_seed),
        beside={"proxy": Measured(series({2: 4.6, 4: 4.0}), costs)},
        full_budget_max_logit_diff=1e-6,
    )
    assert [p.k_active for p in points.elastic] == [1, 2, 3, 4]
    assert [p.distinct for p in points.elastic] == [True, False, False, True]
    assert all(p.stable for p in points.elastic)
    assert points.distinct_stable.elastic == 2
    assert points.distinct_stable.baseline == 2
    second = points.elastic[1]
    assert second.nll == pytest.approx(4.5, abs=1e-5)
    assert second.ppl == pytest.approx(np.exp(4.5), rel=1e-4)
    assert (second.share, second.flops_share, second.bytes_share) == (0.5, 0.51, 0.52)
    assert second.stderr == pytest.approx(paired_difference(elastic[2].nll, elastic[3].nll)[1])
    assert points.elastic[-1].stderr is None
    assert [p.share for p in points.baseline] == [0.5, 1.0]
    assert [p.stable for p in points.paper_gates["proxy"]] == [None, None]
    assert (points.tokens, points.seed, points.second_seed, points.second_text) == (400, 7, 8, "another")
    assert parse_operating_points(points.to_json()) == points


def test_counts_are_unknown_until_stability_is_measured() -> None:
    elastic = series({1: 5.0, 2: 4.5})
    costs = {k: Cost(k / 2, k / 2) for k in elastic}
    points = build_operating_points(
        full_budget=2,
        top_k=2,
        elastic=Measured(elastic, costs),
        baseline=series({1: 4.8, 2: 4.0}),
        provenance=Provenance("a text", 0, {}),
        # the second text is enough for the baseline, which has no calibration; not for the elastic model
        further=Further(text="another", elastic_text=elastic, baseline_text=series({1: 4.8, 2: 4.9})),
    )
    assert points.distinct_stable.elastic is None
    assert points.distinct_stable.baseline == 0
    assert [p.distinct for p in points.baseline] == [True, True]

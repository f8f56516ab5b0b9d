"""The objective against a direct computation, and what ill-posed problems get."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_prism.errors import PrismError
from moe_prism.refactor.solvers import BEST_SOLVER, SOLVERS, dropped_mass, relative_dropped_mass

IMPACT = np.random.default_rng(0).random((7, 12), dtype=np.float32)


def test_ours_is_registered_beside_the_papers_and_the_baselines() -> None:
    assert BEST_SOLVER == "balanced"
    assert {"annealing", "balanced", "contiguous", "greedy", "importance"} <= set(SOLVERS)


def test_dropped_mass_of_a_worked_example() -> None:
    impact = np.array([[1, 1, 1, 2, 1, 10], [3, 2, 0, 1, 0, 0]], dtype=np.float32)
    labels = np.array([0, 0, 0, 1, 1, 2])
    # masses: token 0 has (3, 3, 10), token 1 has (5, 1, 0)
    assert dropped_mass(impact, labels, 3, 1) == 3 + 0
    assert dropped_mass(impact, labels, 3, 2) == 6 + 1
    assert dropped_mass(impact, labels, 3, None) == (3 + 7) / 2
    assert relative_dropped_mass(impact, labels, 3, 2) == pytest.approx(7 / 22)


@given(seed=st.integers(0, 1000), n=st.sampled_from([2, 3, 4, 6]))
def test_dropped_mass_is_the_least_over_all_choices_of_k(seed: int, n: int) -> None:
    from itertools import combinations

    rng = np.random.default_rng(seed)
    impact = rng.exponential(size=(5, 12)).astype(np.float32)
    labels = rng.permutation(np.arange(12) % n)
    per_rank = []
    for k in range(1, n):
        lost = sum(
            min(sum(row[labels == s].sum() for s in chosen) for chosen in combinations(range(n), k)) for row in impact
        )
        per_rank.append(lost)
        assert dropped_mass(impact, labels, n, k) == pytest.approx(lost, rel=1e-6)
    assert dropped_mass(impact, labels, n, None) == pytest.approx(np.mean(per_rank), rel=1e-6)


def test_an_idle_expert_loses_nothing() -> None:
    assert relative_dropped_mass(np.zeros((3, 4), np.float32), np.array([0, 0, 1, 1]), 2, 1) == 0.0


@pytest.mark.parametrize("name", list(SOLVERS))
def test_trivial_numbers_of_sub_experts(name: str) -> None:
    solver = SOLVERS.create(name)
    assert solver.solve(IMPACT, 1, None, 0).tolist() == [0] * 12
    assert sorted(solver.solve(IMPACT, 12, 3, 0)) == list(range(12))
    assert dropped_mass(IMPACT, np.zeros(12, np.int64), 1, None) == 0.0


def with_value(value: float) -> np.ndarray:
    impact = IMPACT.copy()
    impact[3, 4] = value
    return impact


@pytest.mark.parametrize(
    ("impact", "n", "k", "message"),
    [
        (IMPACT, 5, 2, r"12 neurons, got 5; choose one of 1, 2, 3, 4, 6, 12"),
        (IMPACT, 0, None, r"got 0; choose one of"),
        (IMPACT, 4, 0, r"switched_off must be in 1\.\.3 for 4 sub-experts, got 0"),
        (IMPACT, 4, 4, r"switched_off must be in 1\.\.3 for 4 sub-experts, got 4"),
        (IMPACT, 1, 1, r"one sub-expert.* got 1; use None"),
        (with_value(np.nan), 4, 2, r"NaN or infinite"),
        (with_value(np.inf), 4, 2, r"NaN or infinite"),
        (with_value(-0.5), 4, 2, r"non-negative, its least value is -0\.5"),
        (IMPACT[:0], 4, 2, r"got shape \(0, 12\)"),
        (IMPACT[0], 4, 2, r"got shape \(12,\)"),
        (np.ones((3, 4), np.int64), 4, 2, r"floating dtype, got int64"),
        (np.full((2, 4), 1e300), 2, 1, r"NaN or infinite"),
    ],
)
def test_an_ill_posed_problem_is_refused(impact: np.ndarray, n: int, k: int | None, message: str) -> None:
    for name in SOLVERS:
        with pytest.raises(PrismError, match=message):
            SOLVERS.create(name).solve(impact, n, k, 0)
    with pytest.raises(PrismError, match=message):
        dropped_mass(impact, np.zeros(12, np.int64), n, k)


@pytest.mark.parametrize("labels", [[0, 1], [0, 1] * 5 + [0, 2], [-1, 1] * 6])
def test_labels_must_fit(labels: list[int]) -> None:
    with pytest.raises(PrismError, match=r"12 values in 0\.\.1"):
        dropped_mass(IMPACT, np.array(labels), 2, 1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("annealing", {"swaps": -1}, "swaps must be 0 or more, got -1"),
        ("annealing", {"initial_temperature": float("nan")}, "initial_temperature must be 0 or more, got nan"),
        ("annealing", {"cooling": 1.5}, r"cooling must be in \(0, 1\], got 1.5"),
        ("balanced", {"runs": 0}, "runs must be 1 or more, got 0"),
        ("balanced", {"polish_rounds": -2}, "polish_rounds must be 0 or more, got -2"),
        ("balanced", {"cold_swaps": -3}, "cold_swaps must be 0 or more, got -3"),
        ("greedy", {"swaps": 5}, "has no option 'swaps'"),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(PrismError, match=message):
        SOLVERS.create(name, options)

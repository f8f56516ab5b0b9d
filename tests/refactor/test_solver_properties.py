"""What holds for every registered solver on any problem."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.refactor.solvers import SOLVERS, Solver, dropped_mass

# Small enough for many examples; a new solver runs with its defaults.
OPTIONS = {"annealing": {"swaps": 2000}, "balanced": {"runs": 2, "polish_rounds": 3, "cold_swaps": 200}}


def solver_of(name: str) -> Solver:
    return SOLVERS.create(name, OPTIONS.get(name))


def correlated(tokens: int, neurons: int, seed: int) -> np.ndarray:
    """Heavy-tailed, sparse, with groups of neurons that fire together."""
    rng = np.random.default_rng(seed)
    topics = rng.exponential(size=(tokens, 5)) ** 3
    impact = topics[:, rng.integers(5, size=neurons)] * rng.exponential(size=(tokens, neurons))
    return (impact * (rng.random((tokens, neurons)) < 0.8)).astype(np.float32)


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, int, int | None, int]:
    n = draw(st.integers(2, 6))
    impact = correlated(draw(st.integers(1, 300)), n * draw(st.integers(2, 8)), draw(st.integers(0, 10**6)))
    return impact, n, draw(st.none() | st.integers(1, n - 1)), draw(st.integers(0, 2**32))


@pytest.mark.parametrize("name", list(SOLVERS))
@given(problem=problems())
@settings(max_examples=40, deadline=None)
def test_labels_are_a_partition_into_equal_sizes_and_repeatable(
    name: str, problem: tuple[np.ndarray, int, int | None, int]
) -> None:
    impact, n, k, seed = problem
    before = impact.copy()
    labels = solver_of(name).solve(impact, n, k, seed)
    assert labels.dtype == np.int64
    assert labels.shape == (impact.shape[1],)
    assert np.bincount(labels, minlength=n).tolist() == [impact.shape[1] // n] * n
    assert np.array_equal(labels, solver_of(name).solve(impact, n, k, seed))
    assert np.array_equal(impact, before)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_layout_and_dtype_of_the_impact_do_not_matter(name: str) -> None:
    impact = correlated(200, 24, 1)
    expected = solver_of(name).solve(impact, 4, 2, 7)
    for same in (np.asfortranarray(impact), impact.astype(np.float64), np.repeat(impact, 2, axis=1)[:, ::2]):
        assert np.array_equal(solver_of(name).solve(same, 4, 2, 7), expected)


@pytest.mark.parametrize("name", ["annealing", "balanced"])
def test_threads_do_not_change_labels(name: str) -> None:
    impacts = [correlated(200, 24, seed) for seed in range(6)]
    solve = partial(solver_of(name).solve, num_sub_experts=4, switched_off=2, seed=3)
    with ThreadPoolExecutor(4) as pool:
        for alone, beside in zip(map(solve, impacts), pool.map(solve, impacts), strict=True):
            assert np.array_equal(alone, beside)


@pytest.mark.parametrize("name", ["annealing", "balanced"])
@given(problem=problems())
@settings(max_examples=40, deadline=None)
def test_search_is_never_worse_than_its_start(name: str, problem: tuple[np.ndarray, int, int | None, int]) -> None:
    impact, n, k, seed = problem
    start = {"annealing": "greedy", "balanced": "importance"}[name]
    # at temperature 0 the annealer accepts gains only; hot, the paper's may end above its start
    options = {"swaps": 500, "initial_temperature": 0.0} if name == "annealing" else {}
    found = SOLVERS.create(name, options).solve(impact, n, k, seed)
    first = SOLVERS.create(start).solve(impact, n, k, seed)
    assert dropped_mass(impact, found, n, k) <= dropped_mass(impact, first, n, k) * (1 + 1e-5)


def test_importance_sorts_by_total_and_contiguous_does_not() -> None:
    impact = np.array([[1, 9, 2, 8, 3, 7]], dtype=np.float32)
    assert SOLVERS.create("importance").solve(impact, 3, 1, 0).tolist() == [2, 0, 2, 0, 1, 1]
    assert SOLVERS.create("contiguous").solve(impact, 3, 1, 0).tolist() == [0, 0, 1, 1, 2, 2]


def test_greedy_balances_load_under_equal_sizes() -> None:
    impact = np.array([[10, 1, 1, 1, 5, 6]], dtype=np.float32)
    # 10 -> 0; 6 -> 1; 5 -> 2; 1 -> 2 (5 is least, now full); 1 -> 1 (6, full); the last to 0
    assert SOLVERS.create("greedy").solve(impact, 3, 1, 0).tolist() == [0, 2, 1, 0, 2, 1]

"""Our solver: against brute force, an exact assignment, planted structure and the paper's annealer."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from solver_truth import optimum

from moe_prism.refactor.solvers import SOLVERS, dropped_mass
from moe_prism.refactor.solvers.base import labels_of, switched_off_counts
from moe_prism.refactor.solvers.descent import descend, kth_smallest, linear_costs, rebalance
from moe_prism.refactor.solvers.polish import polish

NO_BATCHES = np.empty(0, np.int64)


def heavy_tailed(tokens: int, neurons: int, seed: int) -> np.ndarray:
    """Neurons that answer to three of eight topics each, by heavy-tailed amounts."""
    rng = np.random.default_rng(seed)
    topics = rng.exponential(size=(tokens, 8)) ** 2
    answers = (rng.random((8, neurons)) < 0.4) * rng.exponential(size=(8, neurons))
    return ((topics @ answers) * rng.exponential(size=(tokens, neurons))).astype(np.float32)


def weights_of(n: int, k: int | None) -> np.ndarray:
    return (np.arange(n)[:, None] < switched_off_counts(n, k)).mean(axis=1).astype(np.float32)


@pytest.mark.parametrize(("neurons", "n", "k"), [(8, 2, 1), (8, 4, 1), (8, 4, 2), (8, 4, None), (6, 3, 2)])
def test_reaches_the_optimum_of_small_problems(neurons: int, n: int, k: int | None) -> None:
    solver = SOLVERS.create("balanced", {"runs": 60, "polish_rounds": 10})
    for seed in range(4):
        impact = heavy_tailed(40, neurons, seed)
        found = dropped_mass(impact, solver.solve(impact, n, k, 0), n, k)
        assert found == pytest.approx(optimum(impact, n, k), rel=1e-6)


def test_finds_planted_sub_experts() -> None:
    rng = np.random.default_rng(0)
    planted = rng.permutation(np.arange(64) % 4)
    # every token uses the neurons of two groups and next to nothing of the others
    used = np.array([rng.permutation(4) < 2 for _ in range(400)])
    impact = np.where(used[:, planted], rng.exponential(size=(400, 64)), 0.001).astype(np.float32)
    labels = SOLVERS.create("balanced").solve(impact, 4, 2, 0)
    assert len(set(zip(labels, planted, strict=True))) == 4


def test_beats_the_papers_annealer_on_average_and_runs_and_polish_help() -> None:
    losses: dict[str, list[float]] = {"annealing": [], "default": [], "more": []}
    for seed in range(6):
        impact = heavy_tailed(600, 128, seed)
        for key, solver in (
            ("annealing", SOLVERS.create("annealing")),
            ("default", SOLVERS.create("balanced")),
            ("more", SOLVERS.create("balanced", {"runs": 10, "polish_rounds": 10})),
        ):
            losses[key].append(dropped_mass(impact, solver.solve(impact, 4, 2, 0), 4, 2))
    mean = {key: np.mean(values) for key, values in losses.items()}
    assert mean["more"] < mean["default"] < mean["annealing"]
    assert sum(a < b for a, b in zip(losses["more"], losses["annealing"], strict=True)) >= 5


@given(seed=st.integers(0, 10**6), n=st.integers(2, 6), tokens=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_linear_costs_touch_the_objective_and_bound_it(seed: int, n: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    impact = heavy_tailed(tokens, n * 5, seed)
    k = None if seed % 3 == 0 else int(rng.integers(1, n))
    members, other = (rng.permutation(n * 5).reshape(n, 5) for _ in range(2))
    costs = np.empty((n, n * 5), np.float32)
    value = linear_costs(impact, np.arange(tokens), members, weights_of(n, k), costs)
    exact = dropped_mass(impact, labels_of(members), n, k)
    assert value == pytest.approx(exact, rel=1e-5, abs=1e-6)
    assert costs[labels_of(members), np.arange(n * 5)].sum() == pytest.approx(exact, rel=1e-5, abs=1e-6)
    bound = costs[labels_of(other), np.arange(n * 5)].sum()
    assert dropped_mass(impact, labels_of(other), n, k) <= bound * (1 + 1e-5) + 1e-6


@given(values=st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=40), data=st.data())
@settings(max_examples=200, deadline=None)
def test_kth_smallest_is_what_sorting_gives(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values) - 1))
    assert kth_smallest(np.array(values, np.float32), k) == sorted(values)[k]


@given(seed=st.integers(0, 10**6), n=st.integers(2, 5), with_ties=st.booleans())
@settings(max_examples=60, deadline=None)
def test_rebalance_is_exact_for_two_and_never_worse(seed: int, n: int, with_ties: bool) -> None:
    rng = np.random.default_rng(seed)
    costs = rng.random((n, n * 6), dtype=np.float32)
    if with_ties:
        costs = np.round(3 * costs)
    members = rng.permutation(n * 6).reshape(n, 6)
    neurons = np.arange(n * 6)
    before = costs[labels_of(members), neurons].sum()
    change = rebalance(costs, members)
    after = costs[labels_of(members), neurons].sum()
    assert sorted(members.ravel()) == neurons.tolist()
    assert change <= 0
    assert before + change == pytest.approx(after, abs=1e-4)
    if n == 2:
        seats = np.repeat(np.arange(n), 6)
        row, column = linear_sum_assignment(costs[seats])
        assert after == pytest.approx(costs[seats][row, column].sum(), abs=1e-4)


@pytest.mark.parametrize("k", [1, 2, 3, None])
def test_descent_on_all_tokens_never_rises_and_ends_at_its_bound(k: int | None) -> None:
    impact = heavy_tailed(300, 64, 5)
    members = np.random.default_rng(1).permutation(64).reshape(4, 16)
    values = [dropped_mass(impact, labels_of(members), 4, k)]
    for _ in range(15):
        bound = descend(impact, members, weights_of(4, k), NO_BATCHES, NO_BATCHES, 1)
        values.append(dropped_mass(impact, labels_of(members), 4, k))
        assert values[-1] <= bound * (1 + 1e-5)
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(values))
    assert values[-1] < 0.98 * values[0]
    assert bound == pytest.approx(values[-1], rel=1e-5)


@pytest.mark.parametrize("k", [2, None])
def test_polish_lowers_a_settled_partition(k: int | None) -> None:
    gained = 0
    for seed in range(5):
        impact = heavy_tailed(200, 48, seed)
        members = np.random.default_rng(seed).permutation(48).reshape(4, 12)
        descend(impact, members, weights_of(4, k), NO_BATCHES, NO_BATCHES, 30)
        settled = dropped_mass(impact, labels_of(members), 4, k)
        columns = np.ascontiguousarray(impact.T)
        polish(impact, columns, members, switched_off_counts(4, k), weights_of(4, k), 12, 20)
        polished = dropped_mass(impact, labels_of(members), 4, k)
        assert sorted(members.ravel()) == list(range(48))
        assert polished <= settled * (1 + 1e-5)
        gained += polished < settled * (1 - 1e-4)
        # with every neuron a candidate, nothing is left for any single swap
        for i, j in [(0, 1), (0, 3), (2, 3)]:
            for slot_i, slot_j in [(0, 0), (3, 7), (11, 5)]:
                tried = members.copy()
                tried[i, slot_i], tried[j, slot_j] = members[j, slot_j], members[i, slot_i]
                assert dropped_mass(impact, labels_of(tried), 4, k) >= polished * (1 - 1e-5)
    assert gained >= 3


def test_refinement_is_never_worse() -> None:
    gained = 0
    for seed in range(5):
        impact = heavy_tailed(300, 64, seed)
        plain, polished, cold = (
            dropped_mass(impact, SOLVERS.create("balanced", options).solve(impact, 4, 2, 0), 4, 2)
            for options in ({}, {"polish_rounds": 10}, {"polish_rounds": 10, "cold_swaps": 5000})
        )
        assert cold <= polished * (1 + 1e-6)
        assert polished <= plain * (1 + 1e-6)
        gained += cold < plain
    assert gained >= 3


@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
def test_few_tokens_are_enough(tokens: int) -> None:
    impact = heavy_tailed(tokens, 16, tokens)
    labels = SOLVERS.create("balanced", {"runs": 3, "polish_rounds": 2}).solve(impact, 4, 2, 0)
    assert np.bincount(labels).tolist() == [4] * 4


def test_idle_neurons_and_equal_neurons_are_dealt_out_evenly() -> None:
    for impact in (np.zeros((50, 16), np.float32), np.ones((50, 16), np.float32)):
        labels = SOLVERS.create("balanced", {"polish_rounds": 2}).solve(impact, 4, 2, 0)
        assert np.bincount(labels).tolist() == [4] * 4

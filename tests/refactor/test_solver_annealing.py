"""The paper's annealer: against brute force and against a plain walk that recomputes everything."""

from __future__ import annotations

import numpy as np
import pytest
from solver_truth import optimum, partitions

from moe_prism.refactor.solvers import SOLVERS, dropped_mass
from moe_prism.refactor.solvers.annealing import Annealing
from moe_prism.refactor.solvers.base import labels_of, members_of, switched_off_counts
from moe_prism.refactor.solvers.swaps import anneal


def test_defaults_are_the_papers() -> None:
    assert Annealing() == Annealing(swaps=100_000, initial_temperature=100.0, cooling=0.995)


@pytest.mark.parametrize(("n", "k", "count"), [(2, 1, 35), (4, 2, 105), (4, None, 105)])
def test_reaches_the_optimum_of_small_problems(n: int, k: int | None, count: int) -> None:
    assert sum(1 for _ in partitions(8, n)) == count
    solver = SOLVERS.create("annealing", {"swaps": 20_000})
    for seed in range(4):
        impact = (np.random.default_rng(seed).exponential(size=(25, 8)) ** 2).astype(np.float32)
        best = optimum(impact, n, k)
        # the paper's walk ends where it cools, so several walks are needed to be sure of the optimum
        reached = [dropped_mass(impact, solver.solve(impact, n, k, walk), n, k) for walk in range(5)]
        assert min(reached) == pytest.approx(best, rel=1e-6)


def test_walk_equals_a_plain_one_that_recomputes_the_objective() -> None:
    rng = np.random.default_rng(3)
    impact = rng.exponential(size=(30, 12)).astype(np.float32)
    n, k, swaps, cooling = 4, 2, 400, 0.98
    picks = rng.integers([0, 1, 0, 0], [n, n, 3, 3], size=(swaps, 4), dtype=np.int64)
    chances = rng.random(swaps)
    start = members_of(np.arange(12) % n, n)

    plain, temperature, uphill = start.copy(), 5.0, 0
    for (i, offset, slot_i, slot_j), chance in zip(picks, chances, strict=True):
        j = (i + offset) % n
        tried = plain.copy()
        tried[i, slot_i], tried[j, slot_j] = plain[j, slot_j], plain[i, slot_i]
        delta = dropped_mass(impact, labels_of(tried), n, k) - dropped_mass(impact, labels_of(plain), n, k)
        if delta < 0 or chance < np.exp(-delta / temperature):
            plain = tried
            uphill += delta > 0
        temperature *= cooling

    fast = start.copy()
    anneal(np.ascontiguousarray(impact.T), fast, switched_off_counts(n, k), picks, chances, 5.0, cooling)
    assert uphill > 10
    assert np.array_equal(fast, plain)


def test_seeds_differ_and_no_swaps_is_greedy() -> None:
    impact = np.random.default_rng(0).exponential(size=(60, 32)).astype(np.float32)
    short = SOLVERS.create("annealing", {"swaps": 300})
    assert not np.array_equal(short.solve(impact, 4, 2, 0), short.solve(impact, 4, 2, 1))
    none = SOLVERS.create("annealing", {"swaps": 0}).solve(impact, 4, 2, 0)
    assert np.array_equal(none, SOLVERS.create("greedy").solve(impact, 4, 2, 0))

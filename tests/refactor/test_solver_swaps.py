"""The incremental arithmetic of swaps against recomputation from scratch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.refactor.solvers import dropped_mass
from moe_prism.refactor.solvers.base import labels_of, members_of, switched_off_counts
from moe_prism.refactor.solvers.swaps import anneal, masses_of, pair_index, refresh_caps, swap_delta


def test_pair_index_numbers_every_pair_once() -> None:
    for n in range(2, 8):
        found = [pair_index(i, j, n) for i in range(n) for j in range(i + 1, n)]
        assert found == list(range(n * (n - 1) // 2))
        assert pair_index(n - 1, 0, n) == pair_index(0, n - 1, n)


def test_members_and_labels_are_inverse() -> None:
    labels = np.random.default_rng(0).permutation(np.arange(24) % 4)
    assert np.array_equal(labels_of(members_of(labels, 4)), labels)


@given(seed=st.integers(0, 10**6), n=st.integers(2, 6), size=st.integers(1, 4), with_ties=st.booleans())
@settings(max_examples=150, deadline=None)
def test_swap_delta_is_the_difference_of_two_objectives(seed: int, n: int, size: int, with_ties: bool) -> None:
    rng = np.random.default_rng(seed)
    impact = rng.exponential(size=(20, n * size)).astype(np.float32)
    if with_ties:
        impact = np.round(impact)
    members = rng.permutation(n * size).reshape(n, size)
    columns = np.ascontiguousarray(impact.T)
    i, j = rng.choice(n, size=2, replace=False)
    slot_i, slot_j = rng.integers(size, size=2)
    swapped = members.copy()
    swapped[i, slot_i], swapped[j, slot_j] = members[j, slot_j], members[i, slot_i]
    masses = masses_of(columns, members)
    for k in [*range(1, n), None]:
        ranks = switched_off_counts(n, k)
        caps = np.empty((ranks.size, 20), np.float32)
        refresh_caps(masses, i, j, ranks, np.empty_like(masses), caps)
        delta = swap_delta(masses[i], masses[j], columns[members[i, slot_i]], columns[members[j, slot_j]], caps)
        expected = dropped_mass(impact, labels_of(swapped), n, k) - dropped_mass(impact, labels_of(members), n, k)
        assert delta / ranks.size == pytest.approx(expected, abs=1e-4)


@given(seed=st.integers(0, 10**6), n=st.integers(2, 5), k_is_mean=st.booleans(), hot=st.booleans())
@settings(max_examples=40, deadline=None)
def test_incremental_value_equals_recomputation(seed: int, n: int, k_is_mean: bool, hot: bool) -> None:
    rng = np.random.default_rng(seed)
    impact = rng.exponential(size=(50, n * 6)).astype(np.float32)
    k = None if k_is_mean else int(rng.integers(1, n))
    members = rng.permutation(n * 6).reshape(n, 6)
    before = dropped_mass(impact, labels_of(members), n, k)
    swaps = 500
    picks = rng.integers([0, 1, 0, 0], [n, n, 6, 6], size=(swaps, 4), dtype=np.int64)
    change, accepted = anneal(
        np.ascontiguousarray(impact.T),
        members,
        switched_off_counts(n, k),
        picks,
        rng.random(swaps),
        100.0 if hot else 0.0,
        0.995,
    )
    after = dropped_mass(impact, labels_of(members), n, k)
    assert sorted(members.ravel()) == list(range(n * 6))
    assert accepted > 0 or not hot  # a cold walk may start at a local optimum
    assert before + change == pytest.approx(after, rel=1e-5)
    if not hot:
        assert after <= before

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import elastic_model
from tiny import tokens

import moe_prism
from moe_prism.elastic.batch_selection import choose
from moe_prism.elastic.dial import StepBudgets
from moe_prism.elastic.selection import best, first_candidates, pooled_scores
from moe_prism.errors import PrismError

N = 3


@st.composite
def steps(draw: st.DrawFn, experts: int = 6, largest: int = 6):
    """Scores, weights, routed experts and budgets of a small step; some slots may hold no expert."""
    t, k = draw(st.integers(1, largest)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.rand(t, k, N, generator=generator)
    if draw(st.booleans()):
        scores = (scores * 2).round()  # ties and zeros
    weights = torch.rand(t, k, generator=generator) + 1e-3
    index = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(t)])
    valid = None
    if draw(st.booleans()) and k > 1:
        valid = torch.ones(t, k, dtype=torch.bool)
        valid[:, -1] = False
        weights = weights.masked_fill(~valid, 0)
    floors = torch.randint(1, k * N + 1, (t,), generator=generator)
    budgets = torch.maximum(floors, torch.randint(1, k * N + 1, (t,), generator=generator))
    return pooled_scores(scores, weights, True, valid), weights, index, floors, budgets, experts * N


def loaded(chosen: torch.Tensor, index: torch.Tensor) -> set[int]:
    t, slot, part = chosen.nonzero(as_tuple=True)
    return set((index[t, slot] * N + part).tolist())


def reachable(pooled: torch.Tensor) -> torch.Tensor:
    return (pooled.flatten(1) > -torch.inf).sum(1)


@given(steps())
@settings(max_examples=200, deadline=None)
def test_without_a_cap_more_is_taken_only_of_what_is_loaded_anyway(step) -> None:
    pooled, weights, index, floors, budgets, total = step
    own = best(pooled, first_candidates(pooled, weights), floors)
    chosen = choose(pooled, weights, index, StepBudgets(budgets, floors), total)
    assert (chosen | ~own).all()
    assert loaded(chosen, index) == loaded(own, index)
    for t in range(len(pooled)):
        places = itertools.product(range(pooled.shape[1]), range(N))
        at_hand = loaded(own, index)
        free = [(s, i) for s, i in places if int(index[t, s] * N + i) in at_hand and pooled[t, s, i] > -torch.inf]
        count = int(chosen[t].sum())
        assert count == min(int(budgets[t]), len(free))
        value = max(
            sum(float(pooled[t][c]) for c in set_)
            for set_ in itertools.combinations(free, count)
            if _holds_first(t, set_, pooled, weights)
        )
        assert float(pooled[t][chosen[t]].sum()) == pytest.approx(value, abs=1e-5)


def _holds_first(t: int, candidates: tuple, pooled: torch.Tensor, weights: torch.Tensor) -> bool:
    first = int(first_candidates(pooled, weights)[t])
    return pooled[t].flatten()[first] == -torch.inf or divmod(first, N) in candidates


@given(steps(), st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_floors_hold_and_the_cap_gives_way_to_them_only(step, cap: int) -> None:
    pooled, weights, index, floors, budgets, total = step
    chosen = choose(pooled, weights, index, StepBudgets(budgets, floors, cap), total)
    counts = chosen.flatten(1).sum(1)
    assert (counts >= torch.minimum(floors, reachable(pooled))).all()
    assert (counts <= budgets).all()
    assert not (chosen & (pooled == -torch.inf)).any()
    needed = len(loaded(choose(pooled, weights, index, StepBudgets(budgets, floors, 1), total), index))
    assert len(loaded(chosen, index)) <= max(cap, needed)
    for t in range(len(pooled)):  # nobody is without the best of its top expert
        first = int(first_candidates(pooled, weights)[t])
        assert chosen[t].flatten()[first] or pooled[t].flatten()[first] == -torch.inf


@given(steps(experts=4, largest=4))
@settings(max_examples=60, deadline=None)
def test_the_greedy_set_is_close_to_the_best_set_of_its_size(step) -> None:
    pooled, weights, index, floors, budgets, total = step
    chosen = choose(pooled, weights, index, StepBudgets(budgets, torch.ones_like(floors), 6), total)
    mine = loaded(chosen, index)
    candidate = (index[..., None] * N + torch.arange(N)).flatten(1)
    flat = pooled.flatten(1).clamp(min=0)

    def worth(kept: set[int]) -> float:
        inside = torch.tensor([[int(c) in kept for c in row] for row in candidate])
        gains = (flat * inside).sort(dim=1, descending=True).values
        return sum(float(gains[t, : int(budgets[t])].sum()) for t in range(len(flat)))

    # The best set of those that hold what floors load: greedy additions are bounded against these only.
    sure = loaded(choose(pooled, weights, index, StepBudgets(budgets, torch.ones_like(floors), 1), total), index)
    sizes = itertools.combinations(range(total), min(len(mine), total))
    optimum = max(worth(set(s)) for s in sizes if sure <= set(s))
    assert worth(mine) >= (1 - 1 / math.e) * optimum - 1e-5


@given(steps())
@settings(max_examples=100, deadline=None)
def test_a_floor_as_high_as_the_budget_is_plain_selection(step) -> None:
    pooled, weights, index, _, budgets, total = step
    plain = choose(pooled, weights, index, StepBudgets(budgets), total)
    assert torch.equal(plain, choose(pooled, weights, index, StepBudgets(budgets, budgets), total))


def test_the_dial_reaches_every_layer(tmp_path) -> None:
    model = elastic_model("olmoe", tmp_path)
    ids = tokens(8, 1)
    with torch.no_grad():
        with moe_prism.budget(model, 8):
            plain = model(ids).logits
        with moe_prism.budget(model, 8, k_min=8):
            same = model(ids).logits
        with moe_prism.budget(model, 8, k_min=2):
            shared = model(ids).logits
        with moe_prism.budget(model, 8, k_min=2, cap=6):
            capped = model(ids).logits
        with moe_prism.budget(model, 2):
            floor = model(ids).logits
    torch.testing.assert_close(plain, same, atol=1e-5, rtol=1e-5)
    for one, other in itertools.combinations((plain, shared, capped, floor), 2):
        assert not torch.allclose(one, other, atol=1e-4)


def test_a_cap_is_for_cpus() -> None:
    pooled = torch.rand(2, 2, N, device="meta")
    step = StepBudgets(*torch.ones(2, 2, dtype=torch.int64, device="meta"), 3)
    with pytest.raises(PrismError, match="CPU only"):
        choose(pooled, torch.rand(2, 2, device="meta"), torch.zeros(2, 2, dtype=torch.int64, device="meta"), step, 9)

from __future__ import annotations

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.elastic.cpu_selection import select
from moe_prism.elastic.selection import best, first_candidates, gather_selection, pooled_scores


def choose(scores, weights, budgets, weighted, valid=None):
    pooled = pooled_scores(scores, weights, weighted, valid)
    return best(pooled, first_candidates(pooled, weights), budgets)


@st.composite
def problems(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    t, k, n = draw(st.integers(0, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scores = torch.rand(t, k, n, generator=generator)
    if draw(st.booleans()):
        scores = (scores * 3).round()  # ties
    weights = torch.rand(t, k, generator=generator) + 1e-3
    budgets = torch.randint(1, k * n + 1, (t,), generator=generator)
    return scores, weights, budgets, draw(st.booleans())


@given(problems())
@settings(max_examples=200, deadline=None)
def test_every_token_gets_its_budget_and_the_best_that_contains_its_top_expert(problem) -> None:
    scores, weights, budgets, weighted = problem
    chosen = choose(scores, weights, budgets, weighted)
    assert torch.equal(chosen.flatten(1).sum(1), budgets)
    for t in range(len(scores)):
        pooled = scores[t] * weights[t][:, None] if weighted else scores[t]
        top = int(weights[t].argmax())
        assert chosen[t, top].any()
        if pooled.numel() > 12:
            continue
        # brute force: no other set of that size with a sub-expert of the top expert weighs more
        places = [(s, i) for s in range(pooled.shape[0]) for i in range(pooled.shape[1])]
        best = max(
            sum(pooled[p].item() for p in combination)
            for combination in itertools.combinations(places, int(budgets[t]))
            if any(p[0] == top for p in combination)
        )
        assert abs(pooled[chosen[t]].sum().item() - best) < 1e-4


@given(problems())
@settings(max_examples=100, deadline=None)
def test_a_larger_budget_keeps_what_a_smaller_one_chose(problem) -> None:
    scores, weights, budgets, weighted = problem
    more = torch.minimum(budgets + 1, torch.tensor(scores[0].numel() if len(scores) else 1))
    assert (choose(scores, weights, more, weighted) | ~choose(scores, weights, budgets, weighted)).all()


@given(problems())
@settings(max_examples=100, deadline=None)
def test_a_token_gets_the_same_alone_as_in_a_batch(problem) -> None:
    scores, weights, budgets, weighted = problem
    together = choose(scores, weights, budgets, weighted)
    for t in range(len(scores)):
        one = slice(t, t + 1)
        assert torch.equal(choose(scores[one], weights[one], budgets[one], weighted)[0], together[t])


@given(problems(), st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_the_ragged_list_is_sorted_and_complete(problem, seed: int) -> None:
    scores, weights, budgets, weighted = problem
    t, k, n = scores.shape
    generator = torch.Generator().manual_seed(seed)
    index = (
        torch.stack([torch.randperm(6, generator=generator)[:k] for _ in range(t)]) if t else torch.zeros(0, k).long()
    )
    chosen = choose(scores, weights, budgets, weighted)
    selection = gather_selection(chosen, index, weights)
    assert torch.equal(selection.sub_expert, selection.sub_expert.sort().values)
    listed = {
        (int(a), int(b), int(c), float(w))
        for a, b, c, w in zip(selection.token, selection.slot, selection.sub_expert, selection.weight, strict=True)
    }
    expected = {(a, b, int(index[a, b]) * n + c, float(weights[a, b])) for a, b, c in chosen.nonzero().tolist()}
    assert listed == expected


def test_slots_without_an_expert_are_never_chosen() -> None:
    scores = torch.rand(5, 3, 4)
    weights = torch.rand(5, 3)
    valid = torch.tensor([[True, False, True]]).expand(5, 3)
    weights = weights * valid
    chosen = choose(scores, weights, torch.full((5,), 12), True, valid)
    assert chosen[:, 0].all()
    assert chosen[:, 2].all()
    assert not chosen[:, 1].any()
    one = choose(scores, weights, torch.ones(5, dtype=torch.long), True, valid)
    assert torch.equal(one.flatten(1).sum(1), torch.ones(5, dtype=torch.long))


@given(problems())
@settings(max_examples=200, deadline=None)
def test_the_compiled_selection_is_the_same_pair_for_pair(problem) -> None:
    scores, weights, budgets, weighted = problem
    t, k, _ = scores.shape
    index = torch.stack([torch.randperm(k + 2)[:k] for _ in range(t)]) if t else torch.zeros(0, k).long()
    if t:
        scores[0, 0, 0] = float("nan")
    expected = gather_selection(choose(scores, weights, budgets, weighted), index, weights)
    for found, wanted in zip(select(scores, weights, index, budgets, weighted), expected, strict=True):
        assert torch.equal(found, wanted)


@given(problems(), st.sampled_from([torch.inf, -torch.inf, torch.nan]), st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_compiled_selection_gives_every_token_its_budget_whatever_the_scores(
    problem, odd: float, full: bool
) -> None:
    scores, weights, budgets, weighted = problem
    t, k, n = scores.shape
    scores[:, k // 2] = odd
    if full:
        budgets = torch.full_like(budgets, k * n)
    index = torch.arange(k).expand(t, k).contiguous()
    found = select(scores, weights, index, budgets, weighted)
    pairs = set(zip(found.token.tolist(), found.sub_expert.tolist(), strict=True))
    assert len(pairs) == len(found.token) == int(budgets.sum())
    assert torch.equal(torch.bincount(found.token, minlength=t), budgets)
    assert torch.equal(found.sub_expert // n, found.slot)  # slot s holds expert s here


@given(problems())
@settings(max_examples=100, deadline=None)
def test_a_known_number_of_pairs_changes_nothing(problem) -> None:
    scores, weights, budgets, weighted = problem
    chosen = choose(scores, weights, budgets, weighted)
    index = torch.arange(scores.shape[1]).flip(0).expand(len(scores), -1)
    counted = gather_selection(chosen, index, weights)
    for found, wanted in zip(gather_selection(chosen, index, weights, int(budgets.sum())), counted, strict=True):
        assert torch.equal(found, wanted)

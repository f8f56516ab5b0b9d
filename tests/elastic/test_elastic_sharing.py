"""Shared budgets: the mean is never exceeded, floors hold, chunks and neighbours do not matter, full stays full."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import elastic_model, logits
from tiny import tiny_model, tokens
from transformers import DynamicCache

from moe_prism.elastic import budget, dial_of, set_budget
from moe_prism.elastic.budgets import elastic_layers
from moe_prism.elastic.sharing import WINDOW, Sharing, relative_scores
from moe_prism.errors import PrismError

FULL = 8
CPU = torch.device("cpu")
THRESHOLDS = torch.tensor([torch.inf, *np.linspace(0.9, 0.1, FULL - 1).tolist(), -torch.inf])


def shared(sharing: Sharing, budgets: list[float], requests: list[int], seed: int, spread: float = 1.0) -> torch.Tensor:
    scores = torch.rand(len(budgets), 2, FULL // 2, generator=torch.Generator().manual_seed(seed)) ** spread
    means = torch.tensor(budgets, dtype=torch.float64)
    return sharing.share(0, means, torch.tensor(requests), scores, torch.ones(len(budgets), 2), False, THRESHOLDS)


@settings(deadline=None)  # the first call compiles
@given(st.floats(1, FULL - 0.01), st.integers(1, 120), st.floats(0, 1), st.floats(0.2, 5), st.integers(0, 10**6))
def test_the_mean_is_never_exceeded_and_nearly_reached(
    mean: float, count: int, strength: float, spread: float, seed: int
) -> None:
    sharing = Sharing([strength] * FULL, 1)
    got = shared(sharing, [mean] * count, [0] * count, seed, spread)
    assert got.min() >= 1
    assert got.max() <= FULL
    total, target = np.cumsum(got.numpy()), mean * np.arange(1, count + 1)
    assert (total <= target + 1e-6).all()  # after every token, not only at the end
    assert (total >= target - (WINDOW + 1) * mean).all()
    assert sharing.account(0, 0) == pytest.approx(target[-1] - total[-1], abs=1e-6)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=40), st.lists(st.integers(1, 39), max_size=5), st.integers(0, 99)
)
def test_chunks_and_neighbours_do_not_matter(requests: list[int], cuts: set[int], seed: int) -> None:
    scores = torch.rand(len(requests), 2, FULL // 2, generator=torch.Generator().manual_seed(seed))
    means = torch.tensor([2.5, 4.0, float(FULL)], dtype=torch.float64)[requests]
    of = torch.tensor(requests)

    def run(parts: list[torch.Tensor]) -> torch.Tensor:
        sharing, out = Sharing([1.0] * FULL, 1), torch.zeros(len(of), dtype=torch.int64)
        for part in parts:
            chosen = scores[part]
            out[part] = sharing.share(0, means[part], of[part], chosen, chosen[..., 0], True, 0.5 * THRESHOLDS)
        return out

    everyone = torch.arange(len(of))
    together = run([everyone])
    edges = sorted({0, len(of), *(c for c in cuts if c < len(of))})
    assert torch.equal(run([everyone[a:b] for a, b in itertools.pairwise(edges)]), together)
    assert torch.equal(run([everyone[of == r] for r in range(3)]), together)
    assert (together[of == 2] == FULL).all()


def test_a_new_request_starts_with_an_empty_account() -> None:
    sharing = Sharing([1.0] * FULL, 1)
    shared(sharing, [4.0] * 9, [1] * 9, 0, spread=9.0)
    assert sharing.account(0, 1) > 0
    sharing.open(torch.tensor([1]))
    assert sharing.account(0, 1) == 0


def test_tokens_with_concentrated_scores_take_less() -> None:
    scores = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[1.0, 0.01], [0.01, 0.01]]])
    relative = relative_scores(scores, torch.full((2, 2), 0.3), True)
    torch.testing.assert_close(relative, scores.flatten(1) / 2)
    means = torch.tensor([2.0, 2.0, 2.0], dtype=torch.float64)
    thresholds = torch.tensor([torch.inf, 0.6, 0.3, 0.2, -torch.inf])
    these = scores[[1, 1, 0]]
    got = Sharing([1.0] * 4, 1).share(0, means, torch.zeros(3).long(), these, torch.full((3, 2), 0.3), True, thresholds)
    assert got.tolist() == [1, 1, 4]


@pytest.mark.parametrize("weighted", [True, False])
def test_what_a_token_wants_is_the_count_of_its_relative_scores(weighted: bool) -> None:
    torch.manual_seed(0)
    scores, weights = torch.rand(50, 2, 4), torch.rand(50, 2)
    relative = relative_scores(scores, weights, weighted)
    thresholds = relative.flatten().quantile(torch.linspace(1, 0, FULL + 1)) + 1e-6
    counts = (relative > thresholds[3]).sum(1).clamp(min=1)
    for t in range(50):
        sharing = Sharing([1.0] * FULL, 1)
        sharing._accounts = np.full((1, 1), float(WINDOW - 9))  # enough to get it, too little to be spent
        token = scores[t : t + 1], weights[t : t + 1], weighted, thresholds
        got = sharing.share(0, torch.tensor([3.0], dtype=torch.float64), torch.tensor([0]), *token)
        assert got.tolist() == [int(counts[t])]


@pytest.fixture(scope="module", params=[0, 4], ids=["gate-first", "ladder"])
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    changes = {"token_budgets": "shared", "layer_budgets": "measured", "neurons": "gate-first", "solver": "importance"}
    changes |= {"shadow_bits": request.param, "compensation_budgets": 2}
    made = elastic_model("olmoe", tmp_path_factory.mktemp("shared"), **changes)
    dial_of(made).sharing = Sharing([1.0] * 16, 2)  # whatever was best on random weights
    return made


def test_full_budget_is_the_original_alone_and_beside_others(model) -> None:
    original = logits(tiny_model("olmoe"))
    with budget(model, 1.0):
        torch.testing.assert_close(logits(model), original, atol=1e-5, rtol=1e-5)
    with budget(model, [16, 3.5]):
        found = logits(model)
    torch.testing.assert_close(found[0], original[0], atol=1e-5, rtol=1e-5)
    assert (found[1] - original[1]).abs().max() > 1e-3


def test_prefill_and_decode_give_what_a_whole_pass_gives(model) -> None:
    ids, cache = tokens(2, 12), DynamicCache()
    with torch.no_grad(), budget(model, [5.5, 9]):
        whole = model(ids).logits
        parts = [model(ids[:, :5], past_key_values=cache, use_cache=True).logits]
        parts += [model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits for at in range(5, 12)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-4)


def test_an_engine_that_names_requests_gets_the_same(model) -> None:
    ids, dial = tokens(2, 12), dial_of(model)
    assert dial.sharing is not None
    with torch.no_grad(), budget(model, [5.5, 9]):
        expected = model(ids).logits
    try:
        dial.sharing.open(torch.tensor([3, 1]))
        dial.fill([5.5] * 12 + [9] * 12, [3] * 12 + [1] * 12)
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
        with pytest.raises(PrismError, match="whole numbers"):
            dial.fill([5.5] * 24)
    finally:
        dial.fill(None)


def test_layers_keep_the_mean_of_a_fractional_budget(model) -> None:
    dial = dial_of(model)
    given_out: dict[int, list[torch.Tensor]] = {}
    real = Sharing.share

    class Spy(Sharing):
        def share(self, layer, *args):
            given_out.setdefault(layer, []).append(real(self, layer, *args))
            return given_out[layer][-1]

    before = dial.sharing
    dial.sharing = Spy([1.0] * 16, 2)
    try:
        with budget(model, 4.25):
            logits(model)
    finally:
        dial.sharing = before
    means = [float(torch.cat(got).double().mean()) for _, got in sorted(given_out.items())]
    assert len(means) == 2
    assert sum(means) / 2 <= 4.25
    assert sum(means) / 2 > 4.25 * (1 - (WINDOW + 1) / 12)
    assert len({int(v) for got in given_out.values() for v in torch.cat(got)}) > 2  # they do differ


def test_budgets_between_whole_numbers_need_sharing(model, tmp_path: Path) -> None:
    equal = elastic_model("olmoe", tmp_path)
    with pytest.raises(PrismError, match="share must be in"):
        set_budget(equal, 4.5)
    for bad in (0.0, -1.0, 16.5, math.nan):
        with pytest.raises(PrismError):
            set_budget(model, bad)
    assert all(state.dial is dial_of(model) for _, state in elastic_layers(model))


def test_floors_of_a_batch_switch_sharing_off(model) -> None:
    ids = tokens()
    dial = dial_of(model)
    with torch.no_grad(), budget(model, 8, k_min=8):
        found = model(ids).logits
    before, dial.sharing = dial.sharing, None
    try:
        with torch.no_grad(), budget(model, 8):
            torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-4)
    finally:
        dial.sharing = before

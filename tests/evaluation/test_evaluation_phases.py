"""Budgets of prompt and continuation: the same as prefill and decode in turn, and a grid that is checked."""

from __future__ import annotations

import pytest
import torch
from evaluation_models import make_elastic
from pydantic import ValidationError
from tiny import tiny_model, tokens
from transformers import DynamicCache

from moe_prism.checkpoint.schema import PhasePoint, Phases
from moe_prism.elastic import budget
from moe_prism.errors import PrismError
from moe_prism.evaluation.phases import measure_phases

CONTEXT = 12


def model_of_test():
    model = tiny_model("olmoe")
    make_elastic(model, tokens(8, 32), sub_experts=4)
    return model


def continuation_loss(model, ids: torch.Tensor, prefill: int, decode: int) -> torch.Tensor:
    """Prefill, then decode token by token with the cache, as an engine does it: ``[rows, tokens]``."""
    half, cache, losses = CONTEXT // 2, DynamicCache(), []
    with torch.no_grad():
        with budget(model, prefill):
            model(ids[:, :half], past_key_values=cache, use_cache=True)
        with budget(model, decode):
            for at in range(half, CONTEXT):
                logits = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits[:, 0]
                losses.append(torch.nn.functional.cross_entropy(logits, ids[:, at + 1], reduction="none"))
    return torch.stack(losses, dim=1)


def test_the_grid_is_that_of_prefill_and_decode_in_turn() -> None:
    model, ids = model_of_test(), tokens(5, CONTEXT + 1, seed=3)
    found = measure_phases(model, ids, [2, 8], "random", batch_size=2)
    assert found.tokens == 4 * CONTEXT // 2  # the fifth window fills no batch
    full = continuation_loss(model, ids[:4], 16, 16)
    for point in found.points:
        alone = continuation_loss(model, ids[:4], point.prefill, point.decode)
        assert point.excess == pytest.approx(float((alone - full).mean()), abs=1e-4)
    assert len({round(point.excess, 4) for point in found.points}) == 9  # or it would not depend on both


def test_bad_budgets_are_refused() -> None:
    model, ids = model_of_test(), tokens(2, CONTEXT + 1)
    for bad in ([4], [4, 4], [0, 4], [4, 17]):
        with pytest.raises(PrismError):
            measure_phases(model, ids, bad, "random")


def test_a_table_with_holes_is_refused() -> None:
    point = PhasePoint(prefill=4, decode=4, excess=0.1, stderr=0.0)
    whole = [PhasePoint(prefill=a, decode=b, excess=0.1, stderr=0.0) for a in (4, 8) for b in (4, 8)]
    table = Phases(text="random", prompt_tokens=6, tokens=10, points=whole)
    assert Phases.model_validate_json(table.to_json()) == table
    for bad in (whole[:3], [*whole, point], whole[::-1]):
        with pytest.raises(ValidationError, match="every pair"):
            Phases(text="random", prompt_tokens=6, tokens=10, points=bad)

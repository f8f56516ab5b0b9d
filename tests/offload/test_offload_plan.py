from __future__ import annotations

import numpy as np
import pytest
import torch
from packing import packed
from tiny import tokens

from moe_prism.elastic import budget, dial_of
from moe_prism.errors import PrismError
from moe_prism.offload.block_file import BlockFile
from moe_prism.offload.load import attach_blocks, load_resident
from moe_prism.offload.plan import plan
from moe_prism.offload.trace import Trace, record


def test_a_trace_names_the_blocks_that_decoding_requires(tmp_path) -> None:
    made = packed("olmoe", tmp_path)
    model, _ = load_resident(made.packed, "auto")
    manager = attach_blocks(model, BlockFile(made.packed / "blocks"), 20, read_ahead=False)
    ids = tokens(1, 40)[0]
    trace = record(model, ids)
    assert dial_of(model).limiter is None
    assert trace.blocks.shape == (2, 40, 16)
    asked: list[list[int]] = []
    step = manager.step
    manager.step = lambda blocks, values: asked.append(list(blocks)) or step(blocks, values)  # type: ignore[method-assign]
    with budget(model, 5), torch.no_grad():  # below full budget layers after the first see other inputs
        model(ids[None, :1])
    first = next(trace.steps(5))
    assert set(asked[0]) == set(first[0])
    manager.close()


def test_misses_are_those_of_the_rule_by_hand() -> None:
    blocks = np.array([[[0], [1], [2], [0], [1], [1]]])
    trace = Trace(blocks, np.ones(blocks.shape, np.float32), per_layer=3)
    assert trace.misses(1, 2, "lru") == pytest.approx(2 / 3)  # 0 and 1 again, then a hit
    assert trace.misses(1, 3, "lru") == 0
    with pytest.raises(PrismError, match="raise --memory"):
        Trace(np.zeros((1, 4, 2), int), np.ones((1, 4, 2), np.float32), 4).misses(2, 1, "lru")


def test_a_plan_has_every_budget_and_bounds_that_hold_together(tmp_path) -> None:
    made = packed("olmoe", tmp_path)
    model, _ = load_resident(made.packed, "auto")
    manager = attach_blocks(model, BlockFile(made.packed / "blocks"), 24)
    found = plan(model, tokens(1, 48)[0], [16, 2, 8])
    assert [point.k_active for point in found.points] == [2, 8, 16]
    assert (found.slots, found.blocks) == (24, 64)
    for point in found.points:
        assert 0 <= point.hit_rate <= 1
        assert 0 < point.least <= point.most
    assert found.points[0].hit_rate > found.points[-1].hit_rate
    with pytest.raises(PrismError, match="32 tokens or more"):
        plan(model, tokens(1, 8)[0], [2])
    manager.close()

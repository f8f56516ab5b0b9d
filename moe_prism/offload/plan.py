"""What an offloaded model will do in a memory, before it is used: hit rate and time of a token at every budget.

The hit rate is that of the eviction rule on a recorded trace; times are the measured speeds of the disk, or of the bus
to an accelerator, and of computing from memory. Reading and computing overlap in part: a token takes at least the
longer of the two and at most their sum. Knows nothing of quality.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from ..elastic import budget, dial_of
from ..errors import PrismError
from .load import RULE, manager_of
from .stored import layers_of, set_stored
from .trace import record

_SAMPLE = 64  # blocks read to know the disk
_REPEATS = 5


class Expected(NamedTuple):
    """One operating point.

    Attributes:
        k_active: budget.
        hit_rate: share of required blocks that are in memory.
        read_seconds: of a token, if nothing overlaps.
        compute_seconds: of a token whose blocks are all in memory.
    """

    k_active: int
    hit_rate: float
    read_seconds: float
    compute_seconds: float

    @property
    def least(self) -> float:
        """Seconds of a token if reading and computing overlap wholly."""
        return max(self.read_seconds, self.compute_seconds)

    @property
    def most(self) -> float:
        """Seconds of a token if nothing overlaps."""
        return self.read_seconds + self.compute_seconds


class MemoryPlan(NamedTuple):
    """What to expect.

    Attributes:
        points: by budget.
        slots: places for blocks.
        blocks: of the model.
        bandwidth: of the disk, or the bus, with blocks of this size: bytes per second.
    """

    points: list[Expected]
    slots: int
    blocks: int
    bandwidth: float


@torch.no_grad()
def plan(
    model: PreTrainedModel, ids: torch.Tensor, budgets: Sequence[int], rule: str = RULE, k_stored: int | None = None
) -> MemoryPlan:
    """Record a text, rehearse it at every budget, measure disk and computing.

    Args:
        model: from ``load_offloaded`` with the memory in question.
        ids: int64 ``[T]`` of a text like those to come; the first half fills the cache.
        budgets: to look at.
        rule: of eviction.
        k_stored: of each budget, how many sub-experts run as stored, the rest at 4 bits; None: all of them.

    Raises:
        PrismError: the text is shorter than 32 tokens, or the model has no copy at 4 bits.
    """
    if len(ids) < 32:
        raise PrismError(f"a text of 32 tokens or more is needed to see which blocks come again, got {len(ids)}")
    manager, ids = manager_of(model), ids.to(model.device)
    trace = record(model, ids)
    bandwidth = manager.tier.bandwidth(len(manager.readers), _SAMPLE)
    dial, shadow = dial_of(model), layers_of(model)[0].shadow
    points, before = [], dial.limiter
    set_stored(model, k_stored)
    try:
        for k_active in sorted(budgets):
            stored = k_active if k_stored is None else min(k_active, k_stored)
            misses = trace.misses(stored, manager.cache.slots, rule)
            read = misses * manager.layout.stride
            if shadow is not None and k_active > stored:
                low = trace.misses(k_active, shadow.manager.cache.slots, rule, stored)
                misses, read = misses + low, read + low * shadow.manager.layout.stride
            required = k_active * len(trace.blocks)
            seconds = _compute_seconds(model, ids, k_active)
            points.append(Expected(k_active, 1 - misses / required, read / bandwidth, seconds))
    finally:
        dial.limiter = before
    return MemoryPlan(points, manager.cache.slots, manager.layout.blocks, bandwidth)


def _compute_seconds(model: PreTrainedModel, ids: torch.Tensor, k_active: int) -> float:
    """One token again and again, less the time it waited: what it needs is in memory, or its waiting is taken off."""
    counted, times = manager_of(model).statistics, []
    with budget(model, k_active):
        cache = DynamicCache(config=model.config)
        for _ in range(_REPEATS):
            begin, stalled = time.perf_counter(), counted.stall_seconds
            # A device has computed once its result has come to the host.
            model(ids[None, :1], past_key_values=cache, use_cache=True).logits[0, -1, 0].item()
            times.append(time.perf_counter() - begin - (counted.stall_seconds - stalled))
    return median(times)

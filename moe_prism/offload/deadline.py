"""Tokens with a deadline on an offloaded model: the clock, the cache and the layers put together.

Knows nothing of how a choice is made (``pace``) or how blocks are read (``manager``).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..elastic import dial_of
from ..elastic.dial import Budget
from ..errors import PrismError
from .load import manager_of
from .pace import Pace, Shadow
from .parts import LayerBlocks
from .predict import FEW_TOKENS
from .statistics import Statistics
from .stored import layers_of

# Read to know how fast the disk is; later it is what layers saw when they waited.
_SAMPLE = 16


@dataclass
class Deadline:
    """The ``Limiter`` of an offloaded model.

    Attributes:
        layers: of the model.
        pace: of its tokens.
        floor: sub-experts that a token is sure of in a layer, as stored.
    """

    layers: list[LayerBlocks]
    pace: Pace
    floor: int
    _before: Statistics = field(default_factory=Statistics, init=False, repr=False)

    def limits(self, tokens: int) -> bool:
        """See ``Limiter.limits``: decoding steps. A prompt runs its budget, and its blocks serve many tokens."""
        return self.pace.seconds is not None and tokens <= FEW_TOKENS

    def limit(self, layer: int, scores: Tensor, chosen: Tensor, floor: Tensor, index: Tensor) -> Tensor:
        """See ``Limiter.limit``."""
        mine = self.layers[layer]
        layout, shadow = mine.manager.layout, None
        if layer == 0:
            self._look_at_the_disk(layout.stride)
        if mine.shadow is not None:
            copy = mine.shadow.manager
            shadow = Shadow(copy.layout.stride / layout.stride, copy.present)
        n = layout.num_sub_experts
        blocks = mine.first + (index[..., None] * n + torch.arange(n)).flatten(1)
        flat = (scores.flatten(1), chosen.flatten(1), floor.flatten(1))
        runs, low = self.pace.choose(layer, *flat, blocks, mine.manager.present, shadow)
        mine.low = None if shadow is None else low.view_as(chosen)
        return runs.view_as(chosen)

    def _look_at_the_disk(self, stride: int) -> None:
        statistics = self.layers[0].manager.statistics
        counted = statistics.since(self._before)
        if counted.stall_bytes >= _SAMPLE * stride:
            self.pace.observe(stride / counted.stall_bandwidth)
            self._before = replace(statistics)


def set_deadline(model: nn.Module, tpot_ms: float | None, k_min: Budget = 1) -> Pace | None:
    """From now on a decoded token has so much time, and runs less than its budget where reads would take longer.

    A token runs what is in memory and the blocks that are worth their time, by score, and never less than ``k_min``
    sub-experts in a layer: a floor that cannot be read in time is read all the same. With a copy at 4 bits
    (``load_offloaded(..., shadow=...)``) what is not in memory is read as that first, and in the time left as stored;
    the floor always runs as stored. Replaces ``set_stored``, with None as well.

    Args:
        model: an offloaded model; its budget, as ``set_budget`` left it, is the most that a token runs.
        tpot_ms: milliseconds of a token; None: no deadline, every token runs its budget exactly.
        k_min: the floor.

    Returns:
        What knows the mean budget used (``mean_budget``); None without a deadline.

    Raises:
        PrismError: a value is out of range, or the model is in memory.
    """
    manager, dial = manager_of(model), dial_of(model)
    if tpot_ms is None:
        dial.limiter = None
        return None
    if not 0 < tpot_ms < float("inf"):
        raise PrismError(f"tpot_ms must be above 0 milliseconds, got {tpot_ms}")
    floor, stride = int(dial.resolve(k_min)), manager.layout.stride
    readers = len(manager.readers)
    seconds = stride / manager.tier.bandwidth(readers, _SAMPLE)
    pace = Pace(len(manager.layout.layers), seconds, lambda: manager.statistics.stall_seconds)
    pace.seconds = tpot_ms / 1000
    dial.limiter = Deadline(layers_of(model), pace, floor)
    return pace

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
from .manager import Manager
from .pace import Pace
from .predict import FEW_TOKENS
from .statistics import Statistics

# Read to know how fast the disk is; later it is what layers saw when they waited.
_SAMPLE = 16


@dataclass
class Deadline:
    """The ``Limiter`` of an offloaded model.

    Attributes:
        manager: of the model.
        pace: of its tokens.
        floor: sub-experts that a token is sure of in a layer.
    """

    manager: Manager
    pace: Pace
    floor: int
    _before: Statistics = field(default_factory=Statistics, init=False, repr=False)

    def limits(self, tokens: int) -> bool:
        """See ``Limiter.limits``: decoding steps. A prompt runs its budget, and its blocks serve many tokens."""
        return self.pace.seconds is not None and tokens <= FEW_TOKENS

    def limit(self, layer: int, scores: Tensor, chosen: Tensor, floor: Tensor, index: Tensor) -> Tensor:
        """See ``Limiter.limit``."""
        layout = self.manager.layout
        if layer == 0:
            self._look_at_the_disk(layout.stride)
        n = layout.num_sub_experts
        blocks = layer * layout.per_layer + (index[..., None] * n + torch.arange(n)).flatten(1)
        flat = (scores.flatten(1), chosen.flatten(1), floor.flatten(1))
        return self.pace.choose(layer, *flat, blocks, self.manager.present).view_as(chosen)

    def _look_at_the_disk(self, stride: int) -> None:
        counted = self.manager.statistics.since(self._before)
        if counted.stall_bytes >= _SAMPLE * stride:
            self.pace.observe(stride / counted.stall_bandwidth)
            self._before = replace(self.manager.statistics)


def set_deadline(model: nn.Module, tpot_ms: float | None, k_min: Budget = 1) -> Pace | None:
    """From now on a decoded token has so much time, and runs less than its budget where reads would take longer.

    A token runs what is in memory and the blocks that are worth their time, by score, and never less than ``k_min``
    sub-experts in a layer: a floor that cannot be read in time is read all the same.

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
    dial.limiter = Deadline(manager, pace, floor)
    return pace

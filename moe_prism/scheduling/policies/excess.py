"""How far above their floors requests may run: the largest excess that time and room allow.

An excess is a number of sub-experts that everyone gets above the floor, up to what each wants. Knows no requests but
their number and sizes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..cost_model import Floats
from ..requests import Columns, State
from .base import memory_left

NOTHING = 0.01  # a share of a step's time that is not worth any quality
# running and waiting requests over those that there is room for: where excess begins to fall, and where none is left
CROWDED, FULL_HOUSE = 0.75, 1.25


def largest(fits: Any, seconds: Floats) -> int:
    """The largest excess that fits; if none does the fastest, which is not 0 where a gate costs more than it saves."""
    found = np.flatnonzero(fits)
    return int(found[-1]) if len(found) else as_good(int(np.argmin(seconds)), seconds)


def as_good(excess: int, seconds: Floats) -> int:
    """The largest excess that takes hardly longer than this one: quality is not given up for nothing."""
    return int(np.flatnonzero(seconds <= (1.0 + NOTHING) * seconds[excess])[-1])


def demand(state: State, waiting: Columns) -> float:
    """Requests that run or wait, over those that there is room for, by places or by memory."""
    limits = state.limits
    found = (len(state.running) + len(state.waiting)) / limits.max_running
    if limits.memory_tokens is not None:
        wanted = float((waiting.prompt_tokens + waiting.max_tokens).sum())
        found = max(found, 1.0 + (wanted - memory_left(state)) / limits.memory_tokens)
    return found


def uncrowded(wanted: float, ease: float, state: State) -> int:
    """The largest excess at a demand: all of it until places run short, none where too many wait for one.

    A place for one request is never short.
    """
    begins = max(CROWDED, 1.0 / state.limits.max_running)
    share = (ease * FULL_HOUSE - wanted) / (FULL_HOUSE - begins)
    return int((state.limits.full_budget - 1) * min(1.0, max(0.0, share)) + 1e-9)

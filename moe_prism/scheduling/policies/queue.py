"""Who is next: taking turns between those who have waited long and the others, and who finds room.

Works on indices of waiting requests. Knows nothing of time or budgets.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..cost_model import Floats
from ..requests import Columns, State
from .base import memory_left

Order = NDArray[np.intp]
Marks = NDArray[np.bool_]


def in_turn(regular: Order, arrival: Floats, late: Marks, admitted: int) -> Order:
    """An order in which those who are late are every second one, the oldest first.

    Args:
        regular: everyone, in the order that holds otherwise, ``[W]``.
        arrival: seconds, ``[W]``.
        late: who has waited too long, ``[W]``.
        admitted: requests admitted so far; after an even number it is the turn of those who are late.
    """
    if not late.any():
        return regular
    oldest = np.argsort(arrival, kind="stable")
    oldest, others = oldest[late[oldest]], regular[~late[regular]]
    turn = admitted % 2
    rank = np.empty(len(regular))
    rank[oldest] = 2 * np.arange(len(oldest)) + turn
    rank[others] = 2 * np.arange(len(others)) + 1 - turn
    return np.argsort(rank)


def those_with_room(order: Order, waiting: Columns, late: Marks, state: State) -> Order:
    """Those for whom there are places and memory, in order.

    Who needs more memory than is left is overtaken by others, unless it is late: its rank is the bound on who starts
    before it.
    """
    places, left = max(0, state.limits.max_running - len(state.running)), memory_left(state)
    size = waiting.prompt_tokens + waiting.max_tokens
    fitting = order[:places]
    if size[fitting].sum() > left:
        chosen: list[int] = []
        for i in order.tolist():
            if len(chosen) >= places or (size[i] > left and late[i]):
                break
            if size[i] <= left:
                chosen.append(i)
                left -= size[i]
        fitting = np.array(chosen, dtype=np.intp)
    return fitting

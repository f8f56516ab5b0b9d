"""Sub-experts that do not run, folded onto those of their expert that do: their routing weight is scaled.

An expert of which m of N sub-experts run has its weight multiplied by ``factors[expert, m]``, fitted by ridge
regression (``refactor.fold``). With all N the factor is 1, so full budget stays the original. Costs one number a routed
expert. Knows nothing of how a budget chose what to run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .selection import Selection


def folded(selection: Selection, factors: Tensor, index: Tensor) -> Selection:
    """The same selection with scaled weights.

    Args:
        selection: sub-experts that run.
        factors: fp32 ``[E, N + 1]``, by expert and number of its sub-experts that run.
        index: int64 ``[T, k]`` routed experts.
    """
    runs = torch.zeros(index.shape, dtype=torch.int64, device=index.device)
    ones = torch.ones_like(selection.token)
    runs.index_put_((selection.token, selection.slot), ones, accumulate=True)
    scale = factors[index, runs][selection.token, selection.slot]
    return selection._replace(weight=selection.weight.float() * scale)

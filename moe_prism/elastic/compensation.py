"""What a budget's output lacks on average, added back: one vector per expert and fitted budget.

Skipped neurons leave a gap whose mean, given that an expert was routed to, is known from calibration. The vectors
are fitted by ``refactor.compensate``; between fitted budgets they are interpolated, and at full budget they are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..gates import Cost, LayerShape


def interpolation(fitted: Sequence[int], full_budget: int) -> Tensor:
    """Share of every fitted budget in the vectors of every budget: fp32 ``[full + 1, P]``.

    Linear between neighbours and towards zero at full budget; below the lowest fitted budget its own are used.
    """
    knots = [*fitted, full_budget]
    rows = torch.zeros(full_budget + 1, len(fitted) + 1)
    for k in range(full_budget + 1):
        above = next(i for i, knot in enumerate(knots) if knot >= max(k, knots[0]))
        part = 0.0 if above == 0 else (knots[above] - k) / (knots[above] - knots[above - 1])
        rows[k, above] = 1 - part
        if part:
            rows[k, above - 1] = part
    return rows[:, :-1]


def compensation_cost(shape: LayerShape) -> Cost:
    """Work per token: the vectors of its experts at the two fitted budgets around its own."""
    weights = 2 * shape.top_k * shape.hidden_size
    return Cost(2 * weights, weights)


class Compensation:
    """The vectors of one layer.

    Attributes:
        vectors: fp32 ``[P, E, H]``.
        shares: ``interpolation`` of the budgets they were fitted at.
    """

    def __init__(self, vectors: Tensor, fitted: Sequence[int], full_budget: int) -> None:
        """``vectors[p]`` was fitted at budget ``fitted[p]``."""
        self.vectors = vectors
        self.shares = interpolation(fitted, full_budget)

    def of(self, index: Tensor, weights: Tensor, budgets: Tensor) -> Tensor:
        """What to add to the output of every token: fp32 ``[T, H]``.

        Args:
            index: int64 ``[T, k]`` routed experts.
            weights: ``[T, k]`` routing weights; zero where a slot holds no expert.
            budgets: int64 ``[T]``.
        """
        if self.vectors.device != index.device:
            self.vectors, self.shares = self.vectors.to(index.device), self.shares.to(index.device)
        routed = torch.zeros(len(index), self.vectors.shape[1], device=index.device)
        routed.scatter_add_(1, index, weights.float())
        shares = self.shares[budgets]
        out = torch.zeros(len(index), self.vectors.shape[2], device=index.device)
        for p in shares.any(dim=0).nonzero().flatten().tolist():
            out.addmm_(routed * shares[:, p : p + 1], self.vectors[p])
        return out

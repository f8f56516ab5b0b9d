"""What a budget's output lacks, given back: by vectors, by a scale per dimension, or by renormalised routing weights.

What is fitted (``refactor.compensate``) is interpolated between the fitted budgets and nothing at full budget, which
stays the original. Knows nothing of how a budget chose what to run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import PrismError
from ..gates import Cost, LayerShape
from .executors.rows import DTYPES, as_rows, from_rows
from .kernels.means import add_means
from .selection import Selection


def interpolation(fitted: Sequence[int], full_budget: int) -> Tensor:
    """Share of every fitted budget in the vectors of every budget: fp32 ``[full + 1, P]``.

    Linear between neighbours and towards zero at full budget; below the lowest fitted budget its own are used.
    """
    knots = [*fitted, full_budget]
    rows = torch.zeros(full_budget + 1, len(fitted) + 1, dtype=torch.float32)  # vLLM loads models with another default
    for k in range(full_budget + 1):
        above = next(i for i, knot in enumerate(knots) if knot >= max(k, knots[0]))
        part = 0.0 if above == 0 else (knots[above] - k) / (knots[above] - knots[above - 1])
        rows[k, above] = 1 - part
        if part:
            rows[k, above - 1] = part
    return rows[:, :-1]


class Recalibration(ABC):
    """What is done to the output of one layer below full budget."""

    @abstractmethod
    def apply(self, out: Tensor, index: Tensor, weights: Tensor, budgets: Tensor, selection: Selection) -> Tensor:
        """The corrected output ``[T, H]``, in the dtype of ``out``; sums are kept in fp32.

        Args:
            out: ``[T, H]``, what the budget computed.
            index: int64 ``[T, k]`` routed experts.
            weights: ``[T, k]`` routing weights; zero where a slot holds no expert.
            budgets: int64 ``[T]``.
            selection: the sub-experts that ran, or that were looked at.
        """

    @abstractmethod
    def cost(self, shape: LayerShape) -> Cost:
        """Work per token."""


class FittedRecalibration(Recalibration):
    """One whose tensor was fitted at a few budgets.

    Attributes:
        vectors: fp32 ``[P, R, H]``; R is the number of experts, or what the class says.
        shares: ``interpolation`` of the budgets they were fitted at.
    """

    def __init__(self, vectors: Tensor, fitted: Sequence[int], full_budget: int) -> None:
        """``vectors[p]`` was fitted at budget ``fitted[p]``."""
        self.vectors = vectors
        self.shares = interpolation(fitted, full_budget)

    @staticmethod
    @abstractmethod
    def rows(num_experts: int) -> int:
        """R of a layer."""

    def place(self, device: torch.device) -> None:
        """Move to a device, once."""
        if self.vectors.device != device:
            self.vectors, self.shares = self.vectors.to(device), self.shares.to(device)


class Compensation(FittedRecalibration):
    """One vector per expert, times its routing weight, is added: the mean of what is skipped."""

    @staticmethod
    def rows(num_experts: int) -> int:
        """One vector per expert."""
        return num_experts

    def of(self, index: Tensor, weights: Tensor, budgets: Tensor) -> Tensor:
        """What to add to the output of every token: fp32 ``[T, H]``; arguments as of ``apply``."""
        self.place(index.device)
        routed = torch.zeros(len(index), self.vectors.shape[1], device=index.device)
        routed.scatter_add_(1, index, weights.float())
        shares = self.shares[budgets]
        out = torch.zeros(len(index), self.vectors.shape[2], device=index.device)
        for p in shares.any(dim=0).nonzero().flatten().tolist():
            out.addmm_(routed * shares[:, p : p + 1], self.vectors[p])
        return out

    def apply(self, out: Tensor, index: Tensor, weights: Tensor, budgets: Tensor, selection: Selection) -> Tensor:
        """See ``Recalibration.apply``."""
        learns = torch.is_grad_enabled() and (out.requires_grad or self.vectors.requires_grad)
        if out.device.type != "cpu" or out.dtype not in DTYPES or learns:
            return (out.float() + self.of(index, weights, budgets)).to(out.dtype)
        self.place(index.device)
        given = self.vectors.detach(), self.shares, budgets, index, weights.detach().float()
        return from_rows(add_means(as_rows(out.contiguous()), *(tensor.numpy() for tensor in given)), out)

    def cost(self, shape: LayerShape) -> Cost:
        """The vectors of a token's experts at the two fitted budgets around its own."""
        weights = 2 * shape.top_k * shape.hidden_size
        return Cost(2 * weights, weights)


class OutputScale(FittedRecalibration):
    """Every dimension of the layer's output is scaled and shifted: ``out * (1 + vectors[p, 0]) + vectors[p, 1]``."""

    @staticmethod
    def rows(num_experts: int) -> int:
        """What the scale differs from 1 by, and the shift."""
        return 2

    def apply(self, out: Tensor, index: Tensor, weights: Tensor, budgets: Tensor, selection: Selection) -> Tensor:
        """See ``Recalibration.apply``."""
        self.place(out.device)
        scale, shift = (self.shares[budgets] @ self.vectors.flatten(1)).chunk(2, dim=1)
        return (out.float() * (1 + scale) + shift).to(out.dtype)

    def cost(self, shape: LayerShape) -> Cost:
        """Scale and shift at the two fitted budgets around its own."""
        weights = 4 * shape.hidden_size
        return Cost(2 * weights, weights)


class Renormalisation(Recalibration):
    """The weights of the experts of which anything runs are scaled to the sum of all routed experts' weights.

    That is what routers with renormalised weights (``norm_topk_prob``) do when they choose fewer experts. Nothing is
    fitted.
    """

    def apply(self, out: Tensor, index: Tensor, weights: Tensor, budgets: Tensor, selection: Selection) -> Tensor:
        """See ``Recalibration.apply``; a token whose experts all run is not changed by a bit."""
        runs = torch.zeros(weights.shape, dtype=torch.bool, device=weights.device)
        runs[selection.token, selection.slot] = True
        kept = (weights.float() * runs).sum(dim=1, keepdim=True)
        total = weights.float().sum(dim=1, keepdim=True)
        return (out.float() * torch.where(kept > 0, total / kept, torch.ones_like(kept))).to(out.dtype)

    def cost(self, shape: LayerShape) -> Cost:
        """Two sums of the routing weights and a product per dimension; no weights are read."""
        return Cost(float(2 * shape.top_k + shape.hidden_size), 0.0)


FITTED: dict[str, type[FittedRecalibration]] = {"mean": Compensation, "scale": OutputScale}
RENORMALISE = "renormalise"


def recalibration(name: str, vectors: Tensor | None, fitted: Sequence[int], full_budget: int) -> Recalibration | None:
    """What a checkpoint says, as an object; None where nothing is done.

    Args:
        name: "mean", "scale" or "renormalise".
        vectors: as of ``FittedRecalibration``; None where nothing was fitted.
        fitted: the budgets they were fitted at.
        full_budget: k * N.

    Raises:
        PrismError: no such recalibration.
    """
    if name == RENORMALISE:
        return Renormalisation()
    if name not in FITTED:
        raise PrismError(f"recalibration must be one of {', '.join([*FITTED, RENORMALISE])}, got {name!r}")
    return None if vectors is None else FITTED[name](vectors, fitted, full_budget)

"""Fit what brings a budget's output nearer to the full one: least squares over the calibration tokens.

The mean, per routed expert, of what the budget leaves out: the vectors ``v_e`` minimise ``|full - budgeted - sum of
w_e v_e|^2``, ``w_e`` being the routing weights, with a little ridge, so that a rarely routed expert stays near zero.
Scale and shift: ``s`` and ``m`` minimise ``|full - s budgeted - m|^2`` per dimension, a little ridge holding s to 1.
All layers of a budget are fitted in one pass; while it runs, the layers put out what the vectors of the next higher
fitted budget give, so that every layer sees inputs that are nearly corrected. Knows nothing of how the budget chose
what to run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import grouped_mm_experts_forward

from ..elastic import budget
from ..elastic.budgets import elastic_layers
from ..elastic.compensation import Compensation, FittedRecalibration, OutputScale
from ..elastic.layer import ElasticLayer
from ..experts import ExpertLayer
from .watch import watch_layers

# Of the mean diagonal: an expert with a hundredth of the usual traffic is held half-way to zero.
_RIDGE = 1e-2


def budgets_to_fit(full_budget: int, count: int) -> list[int]:
    """``count`` budgets, evenly spread over 1..full_budget - 1 (all of them, if there are fewer)."""
    if count >= full_budget - 1:
        return list(range(1, full_budget))
    return sorted({max(1, round(full_budget * (i + 1) / (count + 1))) for i in range(count)})


class _Sums(ABC):
    """Normal equations of one layer."""

    @abstractmethod
    def add(self, index: Tensor, weights: Tensor, full: Tensor, out: Tensor) -> None:
        """Tokens of a batch: the full output and what the budget gave with the vectors of now, fp32 ``[T, H]``."""

    @abstractmethod
    def improve(self, vectors: Tensor) -> Tensor:
        """Better vectors than those of now, ``[R, H]``."""


class _MeanSums(_Sums):
    def __init__(self, layer: ExpertLayer) -> None:
        self.gram = torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64)
        self.gap = torch.zeros(layer.num_experts, layer.hidden_size, dtype=torch.float64)

    def add(self, index: Tensor, weights: Tensor, full: Tensor, out: Tensor) -> None:
        routed = torch.zeros(len(index), len(self.gram), device=index.device)
        routed.scatter_(1, index, weights.float())
        self.gram += (routed.t() @ routed).double().cpu()
        self.gap += (routed.t() @ (full - out)).double().cpu()

    def improve(self, vectors: Tensor) -> Tensor:
        ridge = _RIDGE * self.gram.diagonal().mean().clamp(min=1e-12)
        damped = self.gram + ridge * torch.eye(len(self.gram), dtype=torch.float64)
        solved: Tensor = torch.linalg.solve(damped, self.gap)
        return vectors + solved.float().to(vectors.device)


class _ScaleSums(_Sums):
    def __init__(self, layer: ExpertLayer) -> None:
        self.count = 0
        self.out, self.full, self.square, self.product = torch.zeros(4, layer.hidden_size, dtype=torch.float64)

    def add(self, index: Tensor, weights: Tensor, full: Tensor, out: Tensor) -> None:
        full, out = full.double().cpu(), out.double().cpu()
        self.count += len(out)
        self.out += out.sum(dim=0)
        self.full += full.sum(dim=0)
        self.square += out.square().sum(dim=0)
        self.product += (out * full).sum(dim=0)

    def improve(self, vectors: Tensor) -> Tensor:
        mean_out, mean_full = self.out / self.count, self.full / self.count
        variance = self.square / self.count - mean_out.square()
        covariance = self.product / self.count - mean_out * mean_full
        ridge = _RIDGE * variance.mean().clamp(min=1e-12)
        scale = 1 + (covariance - variance) / (variance + ridge)
        shift = mean_full - scale * mean_out
        # What was seen had the scale and shift of now already; the two maps become one.
        now, shift_now = (1 + vectors[0]).double().cpu(), vectors[1].double().cpu()
        return torch.stack([scale * now - 1, scale * shift_now + shift]).float().to(vectors.device)


_SUMS: dict[type[FittedRecalibration], Callable[[ExpertLayer], _Sums]] = {
    Compensation: _MeanSums,
    OutputScale: _ScaleSums,
}


@torch.no_grad()
def fit_compensation(
    model: PreTrainedModel,
    windows: Tensor,
    position: int,
    k_active: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Fit one budget; the attached layers' vectors of it are completed and returned.

    Args:
        model: elastic, its layers with a recalibration whose vectors of this budget are a first guess.
        windows: int64 ``[n, context]`` calibration tokens.
        position: of the budget among the fitted ones.
        k_active: the budget.
        progress: called with (batches done, batches in all).

    Returns:
        Layer name -> fp32 ``[R, H]``.
    """
    layers = elastic_layers(model)
    sums = {layer.name: _SUMS[type(_fitted(state))](layer) for layer, state in layers}
    watchers = {layer.name: partial(_compare, layer.module, sums[layer.name]) for layer, _ in layers}
    with budget(model, k_active):
        watch_layers(model, windows, watchers, progress)
    for layer, state in layers:
        vectors = _fitted(state).vectors
        vectors[position] = sums[layer.name].improve(vectors[position])
    return {layer.name: _fitted(state).vectors[position].cpu() for layer, state in layers}


def _fitted(state: ElasticLayer) -> FittedRecalibration:
    assert isinstance(state.compensation, FittedRecalibration)  # attached with it
    return state.compensation


def _compare(module: nn.Module, sums: _Sums, x: Tensor, index: Tensor, weights: Tensor, out: Tensor) -> None:
    full = grouped_mm_experts_forward(module, x, index, weights)
    sums.add(index, weights, full.float(), out.float())

"""Fit the factors of folding: how much the sub-experts that run must be scaled to stand for their whole expert.

For an expert's output ``y`` and what its m best sub-experts give, ``y_m``, the factor minimises
``sum w^2 |y - a y_m|^2`` over the calibration tokens routed to it, ``w`` being the routing weight, with a little ridge
towards 1. Which m are the best follows from the gate's scores, token by token. Inputs are those of the full model.
Knows nothing of budgets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..elastic.budgets import elastic_layers
from ..elastic.layer import ElasticLayer
from ..experts import ExpertLayer
from ..experts.neurons import activations, down
from .watch import watch_layers

# Of an expert's mean square: one with little traffic stays near 1.
_RIDGE = 1e-2


class _Sums:
    """Products of the whole output and of what runs with each other, by expert and number that run."""

    def __init__(self, layer: ExpertLayer, state: ElasticLayer) -> None:
        self.layer, self.state = layer, state
        self.square, self.product = torch.zeros(2, layer.num_experts, state.num_sub_experts + 1, dtype=torch.float64)

    def add(self, x: Tensor, index: Tensor, weights: Tensor, _out: Tensor) -> None:
        """Tokens of a batch."""
        state, module = self.state, self.layer.module
        n, size = state.num_sub_experts, self.layer.num_neurons // state.num_sub_experts
        scores = state.gate.score(module, state.on(x.device), x, index, n).values
        for expert in index.unique().tolist():
            token, slot = (index == expert).nonzero(as_tuple=True)
            hidden = activations(module, expert, x[token], slice(0, self.layer.num_neurons))
            rows = down(module, expert, slice(0, self.layer.num_neurons))
            parts = [(hidden[:, i * size : (i + 1) * size] @ rows[i * size : (i + 1) * size]).float() for i in range(n)]
            order = scores[token, slot].argsort(dim=1, descending=True, stable=True)
            outputs = torch.stack(parts, dim=1).gather(1, order[..., None].expand(-1, -1, x.shape[1])).cumsum(dim=1)
            square = weights[token, slot].float().square()[:, None]
            self.square[expert, 1:] += (square * outputs.square().sum(dim=2)).sum(dim=0).double().cpu()
            self.product[expert, 1:] += (square * (outputs * outputs[:, -1:]).sum(dim=2)).sum(dim=0).double().cpu()

    def factors(self) -> Tensor:
        """fp32 ``[E, N + 1]``."""
        ridge = _RIDGE * self.square.mean().clamp(min=1e-12)
        found: Tensor = (self.product + ridge) / (self.square + ridge)
        found[:, -1] = 1.0
        return found.float()


@torch.no_grad()
def fit_folding(
    model: PreTrainedModel, windows: Tensor, progress: Callable[[int, int], None] | None = None
) -> dict[str, Tensor]:
    """The factors of every layer.

    Args:
        model: elastic, at full budget.
        windows: int64 ``[n, context]`` calibration tokens.
        progress: called with (batches done, batches in all).

    Returns:
        Layer name -> fp32 ``[E, N + 1]``.
    """
    sums = {layer.name: _Sums(layer, state) for layer, state in elastic_layers(model)}
    watch_layers(model, windows, {name: found.add for name, found in sums.items()}, progress)
    return {name: found.factors() for name, found in sums.items()}

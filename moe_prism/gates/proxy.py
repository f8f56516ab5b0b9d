"""The paper's training-free gate: a few representative neurons speak for their sub-expert.

arXiv 2510.19366, phase 1.3 ("complex gate"). Knows nothing of how the partition was found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import PrismError
from ..experts.neurons import leading_activations
from .base import GATES, Cost, ExpertProfile, LayerShape, Scores, WeightedGate, rows_of


@GATES.register("proxy")
@dataclass(frozen=True)
class ProxyGate(WeightedGate):
    """Score of a sub-expert = mean absolute activation of its r most central neurons.

    Centrality of a neuron is its summed co-activation ``B^T B`` with the neurons of its sub-expert, where
    ``B[b, c]`` is 1 if neuron c is among the ``active_share`` largest of token b.

    Example::

        gate: proxy
        gate_options: {gate_neurons: 4, active_share: 0.75, weighted: true}

    Attributes:
        gate_neurons: r, of each sub-expert. The paper uses 4.
        active_share: share of an expert's neurons that count as active for a token. The paper uses 3/4.
    """

    reads_neurons: ClassVar[bool] = True
    reads_weights: ClassVar[bool] = True
    gate_neurons: int = 4
    active_share: float = 0.75

    def __post_init__(self) -> None:
        if self.gate_neurons < 1:
            raise PrismError(f"gate_neurons must be at least 1, got {self.gate_neurons}")
        if not 0 < self.active_share <= 1:
            raise PrismError(f"active_share must be in (0, 1], got {self.active_share}")

    def leading(self, profile: ExpertProfile, num_sub_experts: int) -> Tensor:
        """The central neurons of every sub-expert, most central first: int64 ``[N, r]``."""
        magnitude = profile.activations.abs()
        neurons = magnitude.shape[1]
        size = neurons // num_sub_experts
        if self.gate_neurons > size:
            raise PrismError(
                f"gate_neurons must be at most the {size} neurons of a sub-expert, got {self.gate_neurons}; "
                "lower it or num_sub_experts"
            )
        kept = max(1, round(self.active_share * neurons))
        active = torch.zeros_like(magnitude)
        active.scatter_(1, magnitude.topk(kept, dim=1).indices, 1.0)
        out = []
        for n in range(num_sub_experts):
            own = active[:, n * size : (n + 1) * size]
            centrality = own.t() @ own.sum(dim=1)
            out.append(torch.argsort(centrality, descending=True, stable=True)[: self.gate_neurons] + n * size)
        return torch.stack(out)

    def fit(self, profile: ExpertProfile, num_sub_experts: int) -> dict[str, Tensor]:
        """Nothing to store: the gate neurons are the first of every sub-expert."""
        return {}

    def score(self, module: nn.Module, tensors: dict[str, Tensor], x: Tensor, index: Tensor, n: int) -> Scores:
        """Compute the gate neurons of every candidate and keep their activations for the executor."""
        out = x.new_empty(*index.shape, n, self.gate_neurons)
        for expert, token, slot in rows_of(index, int(module.num_experts)):  # type: ignore[arg-type]
            out[token, slot] = leading_activations(module, expert, x[token], n, self.gate_neurons).to(out.dtype)
        return Scores(out.abs().mean(-1), out)

    def cost(self, shape: LayerShape, k_active: float) -> Cost:
        """Gate and up rows of the gate neurons of those candidates that are not selected."""
        idle = shape.top_k * shape.num_sub_experts - k_active
        weights = idle * self.gate_neurons * 2 * shape.hidden_size
        return Cost(2 * weights, weights)

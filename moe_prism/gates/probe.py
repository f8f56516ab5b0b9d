"""A look at gate and up through the token's largest coordinates only.

What a neuron will do is guessed from a part of its dot products. Knows nothing of which neurons then run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import PrismError
from ..experts.neurons import activations
from .base import GATES, Cost, ExpertProfile, LayerShape, Scores, WeightedGate, rows_of, sub_expert_sums


@GATES.register("probe")
@dataclass(frozen=True)
class ProbeGate(WeightedGate):
    """Score = ``sum_c |SiLU(x' W_gate) * (x' W_up)|_c * norm of c's down weights``; x' keeps the largest |x| of x.

    Example::

        gate: probe
        gate_options: {share: 0.25}

    Attributes:
        share: of the coordinates of x that are looked at.
    """

    reads_weights: ClassVar[bool] = True
    share: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise PrismError(f"share must be in (0, 1], got {self.share}")

    def fit(self, profile: ExpertProfile, num_sub_experts: int) -> dict[str, Tensor]:
        """``down_norms`` fp32 ``[C]``."""
        return {"down_norms": profile.down_norms.float()}

    def score(self, module: nn.Module, tensors: dict[str, Tensor], x: Tensor, index: Tensor, n: int) -> Scores:
        """All neurons of the routed experts, by products whose other coordinates are zero: correct, not fast."""
        largest = x.abs().topk(self._coordinates(x.shape[1]), dim=1).indices
        seen = torch.zeros_like(x).scatter_(1, largest, x.gather(1, largest))
        out = torch.zeros(*index.shape, n, device=x.device)
        for expert, token, slot in rows_of(index, int(module.num_experts)):  # type: ignore[arg-type]
            bound = activations(module, expert, seen[token]).float().abs() * tensors["down_norms"][expert]
            out[token, slot] = sub_expert_sums(bound, n)
        return Scores(out)

    def cost(self, shape: LayerShape, k_active: float) -> Cost:
        """The looked-at coordinates of gate and up of all candidates; executors read the selected rows whole again."""
        weights = float(2 * shape.top_k * shape.num_neurons * self._coordinates(shape.hidden_size))
        return Cost(2 * weights, weights)

    def _coordinates(self, hidden_size: int) -> int:
        return max(1, round(self.share * hidden_size))

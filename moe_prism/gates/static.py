"""No scores at run time: sub-experts in the order of their measured importance.

Whatever a token says beyond its routing weights is ignored, so it costs nothing; how much that loses
depends on how busy the neurons of a model are.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .base import GATES, Cost, ExpertProfile, LayerShape, Scores, WeightedGate, sub_expert_sums


@GATES.register("static")
@dataclass(frozen=True)
class StaticGate(WeightedGate):
    """Score = mean over calibration tokens of ``sum_c |activation_c| * norm of c's down weights``.

    Example::

        gate: static
    """

    def fit(self, profile: ExpertProfile, num_sub_experts: int) -> dict[str, Tensor]:
        """``importance`` fp32 ``[N]``."""
        mass = profile.activations.abs().mean(dim=0) * profile.down_norms
        return {"importance": sub_expert_sums(mass, num_sub_experts)}

    def score(self, module: nn.Module, tensors: dict[str, Tensor], x: Tensor, index: Tensor, n: int) -> Scores:
        """A table look-up."""
        return Scores(tensors["importance"][index])

    def cost(self, shape: LayerShape, k_active: float) -> Cost:
        """Nothing."""
        return Cost(0.0, 0.0)

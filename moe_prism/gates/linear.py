"""The paper's linear gate: an ordinary router with one row per sub-expert, which stock kernels serve.

arXiv 2510.19366, phase 1.3. As fitted here, before finetuning, every sub-expert has its expert's row:
at multiples of N it equals the original model's top-k', in between it splits one expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import GATES, Cost, ExpertProfile, LayerShape, Scores, WeightedGate


@GATES.register("linear")
@dataclass(frozen=True)
class LinearGate(WeightedGate):
    """Score = softmax over the token's candidates of ``x . row``.

    Example::

        gate: linear

    Attributes:
        reweights: selected outputs are weighted by this softmax instead of by the routing weights, as in the paper. The
            rows as fitted give (of a softmax router) the same weights; it is for rows that are finetuned.
    """

    reweights: bool = False

    def fit(self, profile: ExpertProfile, num_sub_experts: int) -> dict[str, Tensor]:
        """``rows`` fp32 ``[N, H]``: the expert's own router row, N times."""
        return {"rows": profile.router_row.float().expand(num_sub_experts, -1).contiguous()}

    def score(self, module: nn.Module, tensors: dict[str, Tensor], x: Tensor, index: Tensor, n: int) -> Scores:
        """One matrix product against all E * N rows, as a router does it."""
        rows = tensors["rows"]
        logits = torch.nn.functional.linear(x.float(), rows.flatten(0, 1)).unflatten(1, (-1, n))
        mine = logits.gather(1, index[..., None].expand(-1, -1, n))
        return Scores(mine.flatten(1).softmax(dim=1).view_as(mine))

    def cost(self, shape: LayerShape, k_active: float) -> Cost:
        """All rows of the finer router."""
        weights = float(shape.num_experts * shape.num_sub_experts * shape.hidden_size)
        return Cost(2 * weights, weights)

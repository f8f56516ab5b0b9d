"""Which blocks the next layer will want, guessed from what the present one is given.

The hidden state changes little from one layer to the next, so the next layer's own router and gate, applied to the
present input, name most of what they will choose; nothing is trained. A guess costs a router and a gate. Knows nothing
of files or caches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..elastic.layer import ElasticLayer
from ..elastic.selection import pooled_scores
from ..experts import ExpertLayer

# With many tokens a layer wants most of its blocks anyway, and the guess would cost more than it saves.
FEW_TOKENS = 8


@dataclass(frozen=True)
class Predictor:
    """Guesses for one layer.

    Attributes:
        layer: the one to guess for.
        state: its elastic state.
        first: its first block.
    """

    layer: ExpertLayer
    state: ElasticLayer
    first: int

    @torch.no_grad()
    def blocks(self, x: Tensor, pairs: int) -> list[int]:
        """Likely blocks, the surest first; none for many tokens.

        Args:
            x: ``[T, H]``, the input of the layer in front.
            pairs: how many (token, sub-expert) pairs that layer runs: the next one will run as many.
        """
        if len(x) > FEW_TOKENS:
            return []
        weights, index = self.routed(x)
        n = self.state.num_sub_experts
        scores = self.state.gate.score(self.layer.module, self.state.on(x.device), x, index, n)
        pooled = pooled_scores(scores.values, weights, self.state.gate.weighted).flatten(1).cpu().numpy()
        blocks = (self.first + index.cpu().numpy()[:, :, None] * n + np.arange(n)).reshape(len(x), -1)
        order = np.argsort(-pooled, axis=1, kind="stable")[:, : -(-pairs // len(x))]
        named = np.take_along_axis(blocks, order, 1).flatten()
        if len(x) > 1:
            named = named[np.argsort(-np.take_along_axis(pooled, order, 1).flatten(), kind="stable")]
        return list(dict.fromkeys(named.tolist()))

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Routing weights and experts ``[T, k]`` that the layer's router would give this input."""
        router: Tensor = self.layer.router.weight  # type: ignore[assignment]
        logits = torch.nn.functional.linear(x, router.to(x.dtype)).float()
        weights, index = logits.softmax(dim=-1).topk(self.layer.top_k, dim=-1)
        return weights, index

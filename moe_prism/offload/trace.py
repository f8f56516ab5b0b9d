"""What a text's tokens would like to run, layer by layer, and what a cache would have of it.

A recorded trace answers for every budget and every memory: which of a token's candidates a budget selects follows from
their scores. Knows nothing of disks or time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..elastic import dial_of
from ..errors import PrismError
from .cache import BlockCache
from .eviction import EVICTION


@dataclass(frozen=True)
class Trace:
    """Candidates of every token in every layer, the best first.

    Attributes:
        blocks: int64 ``[L, T, k N]``.
        scores: fp32 ``[L, T, k N]``, what they are compared by.
        per_layer: blocks of a layer.
    """

    blocks: NDArray[np.int64]
    scores: NDArray[np.float32]
    per_layer: int

    def steps(self, k_active: int, first: int = 0) -> Iterator[tuple[list[int], list[float]]]:
        """Blocks and scores of every step of one token in one layer, without its ``first`` best, in order."""
        for token in range(self.blocks.shape[1]):
            for layer in range(len(self.blocks)):
                yield (
                    self.blocks[layer, token, first:k_active].tolist(),
                    self.scores[layer, token, first:k_active].tolist(),
                )

    def misses(self, k_active: int, slots: int, rule: str, first: int = 0) -> float:
        """Blocks that a token has to read, on average over the second half of the trace; the first fills the cache.

        Args:
            k_active: of a token's candidates, how many it runs.
            slots: of the cache.
            rule: of eviction.
            first: how many of the best run from elsewhere.

        Raises:
            PrismError: the trace has fewer than two tokens, or one layer of a token does not fit the cache.
        """
        layers, tokens = len(self.blocks), int(self.blocks.shape[1])
        if tokens < 2:
            raise PrismError(f"a trace needs two tokens or more, got {tokens}")
        if k_active - first > slots:
            raise PrismError(f"a step needs {k_active - first} blocks at once, the cache holds {slots}; raise --memory")
        cache = BlockCache(slots, EVICTION.create(rule))
        missed: list[int] = [
            cache.rehearse(*step, now=i / layers) for i, step in enumerate(self.steps(k_active, first))
        ]
        half: int = tokens // 2
        return sum(missed[half * layers :]) / (tokens - half)


@dataclass
class Recorder:
    """A ``Limiter`` that limits nothing and writes down what it sees.

    Attributes:
        num_sub_experts: N.
        floor: of no effect.
    """

    num_sub_experts: int
    per_layer: int
    floor: int = 1
    _seen: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict, init=False, repr=False)

    def limits(self, tokens: int) -> bool:
        """Every step is looked at."""
        return True

    def limit(self, layer: int, scores: Tensor, chosen: Tensor, floor: Tensor, index: Tensor) -> Tensor:
        """See ``Limiter.limit``."""
        n = self.num_sub_experts
        blocks = layer * self.per_layer + index[..., None] * n + torch.arange(n)
        order = scores.flatten(1).argsort(dim=1, descending=True, stable=True)
        sorted_scores = scores.flatten(1).gather(1, order)
        self._seen.setdefault(layer, []).append((blocks.flatten(1).gather(1, order), sorted_scores))
        return chosen

    def trace(self) -> Trace:
        """All that was seen."""
        layers = [self._seen[layer] for layer in sorted(self._seen)]
        blocks = torch.stack([torch.cat([b for b, _ in seen]) for seen in layers])
        scores = torch.stack([torch.cat([s for _, s in seen]) for seen in layers])
        return Trace(blocks.numpy(), scores.float().numpy(), self.per_layer)


@torch.no_grad()
def record(model: nn.Module, ids: Tensor) -> Trace:
    """The trace of a text: one forward pass at full budget, in which every block is visited at most once.

    Args:
        model: an offloaded model.
        ids: int64 ``[T]``.
    """
    from .load import manager_of

    layout, dial = manager_of(model).layout, dial_of(model)
    recorder = Recorder(layout.num_sub_experts, layout.per_layer)
    before, dial.limiter = dial.limiter, recorder
    try:
        model(ids[None], logits_to_keep=1, use_cache=False)
    finally:
        dial.limiter = before
    return recorder.trace()

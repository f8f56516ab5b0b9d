"""How much of a token's budget runs as stored: its best sub-experts do, the others from their copy at 4 bits.

A sub-expert at 4 bits has 0.28 times the bytes of one in bfloat16, and a token's best few carry most of its output (the
ladder of docs/benchmarks.md, at the grain of blocks). Which ones run from the copy follows from scores alone, not from
what is in memory. Knows nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..elastic import dial_of
from ..elastic.budgets import elastic_layers
from ..elastic.dial import Budget
from ..errors import PrismError
from .load import manager_of
from .parts import LayerBlocks, blocks_of


@dataclass
class StoredBest:
    """The ``Limiter`` that leaves nothing out, and notes what runs from the copy.

    Attributes:
        layers: of the model.
        floor: how many of a token's best run as stored.
    """

    layers: list[LayerBlocks]
    floor: int

    def limits(self, tokens: int) -> bool:
        """See ``Limiter.limits``: prompts and decoding alike."""
        return True

    def limit(self, layer: int, scores: Tensor, chosen: Tensor, floor: Tensor, index: Tensor) -> Tensor:
        """See ``Limiter.limit``."""
        self.layers[layer].low = chosen & ~floor
        return chosen


def set_stored(model: nn.Module, k_stored: Budget | None) -> None:
    """From now on so many of a token's sub-experts run as stored, and the rest of its budget at 4 bits.

    Replaces a deadline, if one was set.

    Args:
        model: from ``load_offloaded`` with ``shadow``; its budget, as ``set_budget`` left it, is what a token runs.
        k_stored: 1..full, the best of a token in every layer; None: all of its budget.

    Raises:
        PrismError: a value out of range, or a model without the copy.
    """
    dial = dial_of(model)
    stored = dial.full_budget if k_stored is None else int(dial.resolve(k_stored))
    layers = layers_of(model)
    if k_stored is not None and layers[0].shadow is None:
        raise PrismError("the model has no copy at 4 bits; load it with load_offloaded(..., shadow=0.5)")
    dial.limiter = None if stored == dial.full_budget else StoredBest(layers, stored)


def layers_of(model: nn.Module) -> list[LayerBlocks]:
    """The blocks of every layer of an offloaded model, in order; raises PrismError for any other."""
    manager_of(model)
    found = [blocks_of(layer.module) for layer, _ in elastic_layers(model)]
    return [blocks for blocks in found if blocks is not None]

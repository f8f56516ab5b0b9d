"""The blocks of one layer, and a selection cut into parts whose blocks fit the cache together.

Knows which pairs of a selection need which block, and nothing of how outputs are computed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..elastic.executors.bias import add_gate_up_bias
from ..elastic.kernels import add_rows, multiply_rows
from ..elastic.kernels.gated import run_starts
from ..elastic.selection import Selection
from .grouping import block_values, pairs_of
from .manager import Manager, Ready, Step
from .predict import Predictor

# Outputs of pairs that are in memory at once: 64 MB.
_PAIR_FLOATS = 1 << 24


@dataclass
class LayerBlocks:
    """Where one layer's sub-experts come from; attached to its module.

    Attributes:
        manager: of the whole model.
        first: the layer's first block.
        predictor: of the next layer's blocks, or None.
        shadow: the same layer's blocks at 4 bits, or None.
        low: bool ``[T, k, N]``, which candidates the run to come takes from the shadow; the dial's limiter leaves it.
    """

    manager: Manager
    first: int
    predictor: Predictor | None = None
    shadow: LayerBlocks | None = None
    low: Tensor | None = None

    @property
    def num_sub_experts(self) -> int:
        """N."""
        return self.manager.layout.num_sub_experts


def blocks_of(module: nn.Module) -> LayerBlocks | None:
    """What ``load_offloaded`` attached to a module, if anything."""
    return module.__dict__.get("_moe_prism_blocks")


def read_ahead(blocks: LayerBlocks, x: Tensor, stored: int, pairs: int) -> None:
    """Begin to read what the next layer will probably want, if a guess is worth its time.

    Args:
        blocks: of the present layer.
        x: its input ``[T, H]``.
        stored: of the pairs, how many it runs as stored, the best ones; the rest is read from the shadow.
        pairs: that it runs in all.
    """
    if blocks.predictor is None or not blocks.manager.guessing.worth:
        return
    begin = time.perf_counter()
    named = blocks.predictor.blocks(x, pairs)
    if not named:  # for a prompt
        return
    blocks.manager.guessing.cost(time.perf_counter() - begin)
    cut = len(named) if blocks.shadow is None else len(named) * stored // pairs
    blocks.manager.read_ahead(named[:cut])
    if blocks.shadow is not None:
        blocks.shadow.manager.read_ahead(named[cut:])


@dataclass(frozen=True)
class Group:
    """Pairs whose blocks are in memory, grouped by block.

    Attributes:
        pairs: S of them.
        at: int64 ``[S]``, their positions in the part.
        starts: int64 ``[G + 1]``, where each block's pairs begin.
        first: int64 ``[G]``, each block's first row in the cache.
    """

    blocks: LayerBlocks
    pairs: Selection
    at: Tensor
    starts: NDArray[np.int64]
    first: NDArray[np.int64]

    def project(self, module: nn.Module, x: Tensor) -> Tensor:
        """Gate and up projections with their biases, laid out for ``_apply_gate``: fp32 ``[S, 2c]``."""
        manager = self.blocks.manager
        size, rows = manager.layout.neurons, manager.tier.rows()
        if isinstance(rows, Tensor):
            each = self.pairs.token.to(x.device)
            products = [x[each[pairs]].to(rows.dtype) @ mine[: 2 * size].t() for pairs, mine in self._each(rows)]
            return add_gate_up_bias(module, torch.cat(products).float(), self.pairs, self.blocks.num_sub_experts)
        parts, count = (1, 2 * size) if manager.layout.interleaved else (2, size)
        out = torch.empty(len(self.at), 2 * size)
        tokens, token = x.float().contiguous().numpy(), self.pairs.token.numpy()
        multiply_rows(rows, tokens, token, self.starts, self.first, parts, size, count, out.numpy())
        return add_gate_up_bias(module, out, self.pairs, self.blocks.num_sub_experts)

    def down(self, hidden: Tensor) -> Tensor:
        """Outputs of weighted activations ``[S, c]``, pair by pair: fp32 ``[S, H]``."""
        layout, rows = self.blocks.manager.layout, self.blocks.manager.tier.rows()
        if isinstance(rows, Tensor):
            down = slice(2 * layout.neurons, 3 * layout.neurons)
            return torch.cat([hidden[pairs].to(rows.dtype) @ mine[down] for pairs, mine in self._each(rows)]).float()
        out = torch.zeros(len(hidden), layout.hidden_size)
        pair, first = np.arange(len(hidden)), self.first + 2 * layout.neurons
        add_rows(rows, hidden.numpy(), pair, self.starts, first, layout.neurons, out.numpy())
        return out

    def _each(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Pairs of each block, and its rows."""
        for group, first in enumerate(self.first.tolist()):
            yield slice(int(self.starts[group]), int(self.starts[group + 1])), rows[first:]


@dataclass(frozen=True)
class Part:
    """Consecutive pairs whose blocks fit into the cache together.

    Attributes:
        pairs: sorted by sub-expert.
        begin: position of the first one in the whole selection.
        starts: int64 ``[G + 1]``, where each block's pairs begin.
    """

    blocks: LayerBlocks
    pairs: Selection
    begin: int
    starts: NDArray[np.int64]

    def as_they_come(self, x: Tensor | None) -> Iterator[Group]:
        """Groups of pairs, those in memory first; with ``x`` the next layer's are read ahead meanwhile."""
        with self.step() as step:
            if x is not None:
                read_ahead(self.blocks, x, len(self.pairs.token), len(self.pairs.token))
            for batch in step:
                at, starts, slot = self.places(batch)
                pairs, first = torch.from_numpy(at), slot * self.blocks.manager.tier.rows_per_slot
                yield Group(self.blocks, Selection(*(values[pairs] for values in self.pairs)), pairs, starts, first)

    def step(self) -> Step:
        """Ask for the blocks; those in memory come first."""
        weight = self.pairs.weight.float().numpy()
        numbers, values = block_values(self.starts, self.pairs.sub_expert.numpy(), weight, self.blocks.first)
        return self.blocks.manager.step(numbers, values)

    def places(self, batch: list[Ready]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Positions of the blocks' pairs in the part, where each block's begin among them, and its slot."""
        at, starts, slot = pairs_of(np.array(batch), self.starts)
        return at, starts, slot


def parts_of(selection: Selection, blocks: LayerBlocks, hidden: int) -> Iterator[Part]:
    """Cut a selection between blocks, so that the blocks of a part fit the cache, and its outputs into memory."""
    bounds = run_starts(selection.sub_expert.numpy())
    groups = len(bounds) - 1
    most_pairs = max(1, _PAIR_FLOATS // hidden)
    group = 0
    while group < groups:
        last = min(group + blocks.manager.cache.slots, groups)
        while last > group + 1 and bounds[last] - bounds[group] > most_pairs:
            last = group + (last - group) // 2
        begin, end = int(bounds[group]), int(bounds[last])
        if last - group == groups:
            yield Part(blocks, selection, 0, bounds)
            return
        yield Part(blocks, Selection(*(v[begin:end] for v in selection)), begin, bounds[group : last + 1] - begin)
        group = last


def by_sub_expert(selection: Selection, n: int, parts: int) -> Selection:
    """A selection of whole experts (n = 1) as one of all their sub-experts; others stay."""
    if n == parts:
        return selection
    sub_expert = (selection.sub_expert[:, None] * parts + torch.arange(parts)).flatten()
    order = torch.argsort(sub_expert, stable=True)
    pair = order // parts
    return Selection(selection.token[pair], selection.slot[pair], sub_expert[order], selection.weight[pair])

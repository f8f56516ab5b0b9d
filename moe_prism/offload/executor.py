"""Run sub-experts from a block file: those in memory while the others are being read.

The outputs of a layer are added up in the order of sub-experts, whichever came first, so that results do not depend
on what was cached. Knows nothing of scores: it is given a selection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..elastic.executors import EXECUTORS, Executor, NeuronRule
from ..elastic.executors.bias import add_gate_up_bias
from ..elastic.kernels import add_rows, gated_blocks, multiply_rows
from ..elastic.selection import Selection
from ..experts.neurons import is_plain
from .manager import Manager, Ready
from .predict import Predictor

NAME = "offload"
# Outputs of pairs that are in memory at once: 64 MB.
_PAIR_FLOATS = 1 << 24


@dataclass
class LayerBlocks:
    """Where one layer's sub-experts come from; attached to its module.

    Attributes:
        manager: of the whole model.
        first: the layer's first block.
        predictor: of the next layer's blocks, or None.
    """

    manager: Manager
    first: int
    predictor: Predictor | None = None

    @property
    def num_sub_experts(self) -> int:
        """N."""
        return self.manager.layout.num_sub_experts


def blocks_of(module: nn.Module) -> LayerBlocks | None:
    """What ``load_offloaded`` attached to a module, if anything."""
    return module.__dict__.get("_moe_prism_blocks")


@EXECUTORS.register(NAME)
@dataclass(frozen=True)
class OffloadExecutor(Executor):
    """Reads what is not in memory; arithmetic in fp32 by the CPU kernels, or on a device by its matrix products."""

    skips_neurons: ClassVar[bool] = True
    runs_full: ClassVar[bool] = True

    def refusal(self, module: nn.Module, x: Tensor) -> str | None:
        """Needs a model that ``load_offloaded`` made, and inputs where its fast tier is."""
        blocks = blocks_of(module)
        if blocks is None:
            return "its weights are not in a block file; load a packed checkpoint with moe_prism.offload.load_offloaded"
        device = blocks.manager.tier.device
        return None if x.device == device else f"the input is on {x.device}, the blocks are on {device}"

    def run(self, module: nn.Module, x: Tensor, selection: Selection, n: int, computed: Tensor | None = None) -> Tensor:
        """See ``Executor.run``; ``computed`` is None, since no gate of an offloaded model reads neurons."""
        blocks = _required(module)
        if x.device.type == "cpu" and is_plain(module):
            return _run_plain(blocks, x, _by_sub_expert(selection, n, blocks.num_sub_experts))
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        selection = Selection(*(values.cpu() for values in selection))  # which block is where is the host's business
        for part in _parts(_by_sub_expert(selection, n, blocks.num_sub_experts), blocks, x.shape[1]):
            outputs = torch.empty(len(part.pairs.token), x.shape[1], device=x.device)
            for ready in part.as_they_come(x):
                projected = ready.project(module, x)
                hidden: Tensor = module._apply_gate(projected)  # type: ignore[operator]
                weight = ready.pairs.weight[:, None].float().to(x.device)
                outputs[ready.at.to(x.device)] = ready.down(hidden * weight)
            out.index_add_(0, part.pairs.token.to(x.device), outputs)
        return out.to(x.dtype)

    def run_some(self, module: nn.Module, x: Tensor, selection: Selection, n: int, rule: NeuronRule) -> Tensor:
        """See ``Executor.run_some``; whole blocks are read, so this saves arithmetic and no bytes.

        Every block is needed twice, before and after the choice; the second time it is in memory if all of them fit.
        """
        blocks = _required(module)
        selection = Selection(*(values.cpu() for values in selection))
        size = blocks.manager.layout.neurons
        hidden, score = torch.empty(2, len(selection.token), size)
        scale = rule.scale.view(-1, size)
        parts = list(_parts(selection, blocks, x.shape[1]))
        for part in parts:
            for ready in part.as_they_come(x):
                gate, up = ready.project(module, x).cpu().chunk(2, dim=1)
                gate = torch.nn.functional.silu(gate) * ready.pairs.weight[:, None].float()
                at = ready.at + part.begin
                hidden[at], score[at] = gate * up, gate.abs() * scale[ready.pairs.sub_expert]
        hidden *= _kept(selection.token, score, rule)
        hidden, out = hidden.to(x.device), torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for part in parts:
            outputs = torch.empty(len(part.pairs.token), x.shape[1], device=x.device)
            for ready in part.as_they_come(None):
                outputs[ready.at.to(x.device)] = ready.down(hidden[(ready.at + part.begin).to(x.device)])
            out.index_add_(0, part.pairs.token.to(x.device), outputs)
        return out.to(x.dtype)


def _run_plain(blocks: LayerBlocks, x: Tensor, selection: Selection) -> Tensor:
    """``OffloadExecutor.run`` by one compiled call for all blocks that are there."""
    rows = blocks.manager.tier.rows()
    if isinstance(rows, Tensor):  # a device that is the CPU: in tests
        rows = rows.view(torch.int16).numpy().view(np.uint16) if rows.dtype != torch.float32 else rows.numpy()
    tokens, size = x.float().contiguous(), blocks.manager.layout.neurons
    out = torch.zeros(x.shape, dtype=torch.float32)
    for part in _parts(selection, blocks, x.shape[1]):
        token, weight = part.pairs.token, part.pairs.weight.float().numpy()
        outputs = torch.empty(len(token), x.shape[1])
        for batch in part.batches(x):
            at, starts, first = part.places(batch)
            gated_blocks(rows, tokens.numpy(), token.numpy(), weight, at, starts, first, size, outputs.numpy())
        out.index_add_(0, token, outputs)
    return out.to(x.dtype)


@dataclass(frozen=True)
class _Group:
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
class _Part:
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

    def as_they_come(self, x: Tensor | None) -> Iterator[_Group]:
        """Groups of pairs; see ``batches``."""
        for batch in self.batches(x):
            at, starts, first = self.places(batch)
            pairs = torch.from_numpy(at)
            yield _Group(self.blocks, Selection(*(values[pairs] for values in self.pairs)), pairs, starts, first)

    def batches(self, x: Tensor | None) -> Iterator[list[Ready]]:
        """Blocks, those in memory first; with ``x`` the next layer's are read ahead meanwhile."""
        manager = self.blocks.manager
        begins = self.starts[:-1]
        numbers = (self.pairs.sub_expert.numpy()[begins] + self.blocks.first).tolist()
        values = np.add.reduceat(self.pairs.weight.float().numpy(), begins)
        with manager.step(numbers, values) as step:
            if x is not None and self.blocks.predictor is not None:
                manager.read_ahead(self.blocks.predictor.blocks(x, len(self.pairs.token)))
            yield from step

    def places(self, batch: list[Ready]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Positions of the blocks' pairs in the part, where each block's begin among them, its first row."""
        position, slot = np.array(batch).T
        begin = self.starts[position]
        starts = np.zeros(len(batch) + 1, np.int64)
        np.cumsum(self.starts[position + 1] - begin, out=starts[1:])
        at = np.arange(starts[-1]) + np.repeat(begin - starts[:-1], np.diff(starts))
        return at, starts, slot * self.blocks.manager.tier.rows_per_slot


def _parts(selection: Selection, blocks: LayerBlocks, hidden: int) -> Iterator[_Part]:
    """Cut a selection between blocks, so that the blocks of a part fit the cache, and its outputs into memory."""
    sub_expert = selection.sub_expert.numpy()
    starts = np.flatnonzero(np.diff(sub_expert, prepend=-1))
    bounds = np.append(starts, len(sub_expert))
    most_pairs = max(1, _PAIR_FLOATS // hidden)
    group = 0
    while group < len(starts):
        last = min(group + blocks.manager.cache.slots, len(starts))
        while last > group + 1 and bounds[last] - bounds[group] > most_pairs:
            last = group + (last - group) // 2
        begin, end = int(bounds[group]), int(bounds[last])
        yield _Part(blocks, Selection(*(v[begin:end] for v in selection)), begin, bounds[group : last + 1] - begin)
        group = last


def _by_sub_expert(selection: Selection, n: int, parts: int) -> Selection:
    """A selection of whole experts (n = 1) as one of all their sub-experts; others stay."""
    if n == parts:
        return selection
    sub_expert = (selection.sub_expert[:, None] * parts + torch.arange(parts)).flatten()
    order = torch.argsort(sub_expert, stable=True)
    pair = order // parts
    return Selection(selection.token[pair], selection.slot[pair], sub_expert[order], selection.weight[pair])


def _kept(token: Tensor, score: Tensor, rule: NeuronRule) -> Tensor:
    """The neurons that run, bool ``[S, c]``: a token's best over all of its pairs."""
    if rule.count is None:
        return score > rule.threshold  # type: ignore[operator]
    flat = score.nan_to_num(torch.inf, torch.inf).flatten().numpy()
    owner = token.repeat_interleave(score.shape[1]).numpy()
    order = np.lexsort((-flat, owner))
    begins = np.searchsorted(owner[order], np.arange(len(rule.count)))
    rank = np.empty(len(flat), np.int64)
    rank[order] = np.arange(len(flat)) - begins[owner[order]]
    return torch.from_numpy(rank < rule.count.numpy()[owner]).view_as(score)


def _required(module: nn.Module) -> LayerBlocks:
    blocks = blocks_of(module)
    assert blocks is not None  # refusal was asked
    return blocks

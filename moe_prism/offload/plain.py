"""Layers of the usual kind on a CPU: one compiled call for all blocks that are there, stored ones and those at 4 bits.

Outputs are added up in the order of sub-experts, the stored ones' and the others' apart, so that the sum does not
depend on which came first. Knows nothing of scores.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..elastic.kernels import add_pairs, digit_blocks, gated_blocks
from ..elastic.selection import Selection
from ..experts.shadow import Planes, from_planes
from .grouping import split_pairs
from .manager import Ready
from .parts import LayerBlocks, Part, parts_of, read_ahead

# Pairs of a block from which its digits are unpacked once for all of them (OLMoE's sizes: docs/log.md).
_UNPACK_FROM = 64


def run_plain(blocks: LayerBlocks, x: Tensor, selection: Selection) -> Tensor:
    """A layer's output ``[T, H]`` for a selection of sub-experts, as ``Executor.run``."""
    low, blocks.low = blocks.low, None
    rest = selection
    works = []
    out = torch.zeros(2, *x.shape)  # added up at last, so that the sum does not depend on which came first
    tokens = x.float().contiguous()
    if low is not None and blocks.shadow is not None:
        token, slot, sub_expert = (values.numpy() for values in selection[:3])
        both = split_pairs(token, slot, sub_expert, selection.weight.float().numpy(), low.numpy())
        rest, theirs = (Selection(*map(torch.from_numpy, some)) for some in both)
        works.append(_outputs(blocks.shadow, tokens, theirs, out[1], _compute_digits))
    ahead = partial(read_ahead, blocks, x, len(rest.token), len(selection.token))
    works.append(_outputs(blocks, tokens, rest, out[0], _compute_stored, ahead))
    _drive(works)
    return (out[0] if rest is selection else out.sum(dim=0)).to(x.dtype)


def _outputs(
    blocks: LayerBlocks,
    tokens: Tensor,
    selection: Selection,
    out: Tensor,
    compute: Callable[[Part, list[Ready], Tensor, Tensor], None],
    ahead: Callable[[], None] | None = None,
) -> Generator[None]:
    """Add a selection's outputs up, stopping once its reads have begun and after every batch of blocks."""
    for part in parts_of(selection, blocks, tokens.shape[1]):
        outputs = torch.empty(len(part.pairs.token), tokens.shape[1])
        with part.step() as step:
            if ahead is not None:
                ahead()
            yield
            for batch in step:
                compute(part, batch, tokens, outputs)
                yield
        add_pairs(out.numpy(), part.pairs.token.numpy(), outputs.numpy())


def _drive(works: list[Generator[None]]) -> None:
    """Take turns, so that all reads have begun before anything is computed; an error ends all of them."""
    with ExitStack() as stack:
        for work in works:
            stack.callback(work.close)
        left, end = works, object()
        while left:
            left = [work for work in left if next(work, end) is not end]


def _compute_stored(part: Part, batch: list[Ready], tokens: Tensor, outputs: Tensor) -> None:
    tier = part.blocks.manager.tier
    at, starts, slot = part.places(batch)
    token, weight = part.pairs.token.numpy(), part.pairs.weight.float().numpy()
    first, size = slot * tier.rows_per_slot, tier.layout.neurons
    gated_blocks(tier.rows(), tokens.numpy(), token, weight, at, starts, first, size, outputs.numpy())


def _compute_digits(part: Part, batch: list[Ready], tokens: Tensor, outputs: Tensor) -> None:
    rows, layout = part.blocks.manager.tier.rows(), part.blocks.manager.layout
    at, starts, slot = part.places(batch)
    counts = starts[1:] - starts[:-1]
    many = counts >= _UNPACK_FROM
    for group in np.flatnonzero(many).tolist():
        pairs = torch.from_numpy(at[starts[group] : starts[group + 1]])
        block = torch.from_numpy(rows[slot[group]][: layout.rows * layout.row_bytes]).view(layout.rows, -1)
        digits = block[:, : layout.hidden_size // 2]
        scale = block[:, layout.hidden_size // 2 :].contiguous().view(torch.bfloat16)
        gate, up, down = from_planes(Planes(digits, digits, scale), 4).chunk(3)
        x, weight = tokens[part.pairs.token[pairs]], part.pairs.weight[pairs].float()
        outputs[pairs] = (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t()) * weight[:, None]) @ down
    mine = np.repeat(slot, counts)
    if many.any():
        few = np.repeat(~many, counts)
        at, mine = at[few], mine[few]
    if len(at):
        token, weights = part.pairs.token.numpy(), part.pairs.weight.float().numpy()
        scales = rows.view(np.uint16)
        digit_blocks(rows, scales, tokens.numpy(), token, weights, at, mine, layout.neurons, outputs.numpy())

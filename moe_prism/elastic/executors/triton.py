"""Fused kernels for GPUs: the work and the weight traffic of the selection, and nothing more.

Gate, up and activation are one kernel, down is a second one; both walk the packed rows, so a sub-expert is
as cheap as its size. A third adds every token's pairs in a fixed order, so results repeat bit for bit.
Launches depend on shapes alone: no value is read back by the host. Triton is imported when it is first
used. Knows nothing of biases and of activations other than SiLU.

Where neurons are chosen in blocks, a gate kernel scores them first, and the tiles of up and down weights of a block
that no token of the tile keeps are not read. Blocks are chosen on the device as well.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...experts.neurons import is_plain
from ...experts.packing import packed_rows
from ..selection import Selection
from .base import EXECUTORS, Executor, NeuronRule

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PAIRS_ADDED_AT_ONCE = 16
# The shortest side of a product that matrix units take: no tile lies in a smaller block of neurons.
_LEAST_BLOCK = 16


@dataclass(frozen=True)
class Tile:
    """How a product is cut. The sizes follow from shapes, so they are the same for every selection of a size.

    Attributes:
        rows: pairs of one sub-expert; 16 is the least that matrix units take.
        cols: output columns.
        depth: elements of the inner dimension at a time.
        warps, stages: of Triton.
    """

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int

    @classmethod
    def of(cls, pairs: int, groups: int, inner: int, cols: int, item: int) -> Tile:
        """A tile that fits the mean sub-expert.

        Few pairs: weights are all the traffic, so narrow columns (more programs) and deep steps (more bytes in
        flight). Many: larger tiles read everything less often.

        Args:
            pairs: S.
            groups: sub-experts of the layer.
            inner: length of the inner dimension.
            cols: most columns of a tile of few pairs.
            item: bytes of an element.
        """
        rows = min(128, _power_of_two(pairs // groups))
        few = rows <= 32
        depth = min((256 if few else 128) // item, _power_of_two(inner))
        return cls(rows, cols if few else 2 * cols, depth, 8 if rows == 128 else 4, 4 if rows == 16 else 3)

    def grid(self, pairs: int, groups: int, width: int) -> tuple[int, int]:
        """Enough programs for any ``pairs`` pairs: each group that has one wastes less than a tile."""
        tiles = (pairs + min(pairs, groups) * (self.rows - 1)) // self.rows
        return tiles, -(-width // self.cols)


@EXECUTORS.register("triton")
@dataclass(frozen=True)
class TritonExecutor(Executor):
    """Three Triton kernels, four where blocks of neurons are skipped; gated SiLU experts without biases.

    The height of a tile follows the mean number of pairs of a sub-expert. Between batches with the same
    height a token's result is bit for bit the same, otherwise it is to rounding.
    """

    skips_neurons: ClassVar[bool] = True

    def skip_refusal(self, block: int) -> str | None:
        """Needs blocks that tiles fit into."""
        if block % _LEAST_BLOCK:
            return (
                f"it skips neurons in blocks of a multiple of {_LEAST_BLOCK} (neuron_block of a recipe), and this "
                f"checkpoint chooses them in blocks of {block}"
            )
        return None

    def refusal(self, module: nn.Module, x: Tensor) -> str | None:
        """Needs Triton, a GPU (or Triton's interpreter), packed weights in the usual layout, and SiLU."""
        reason = device_refusal(x.device)
        if reason is not None:
            return reason
        if x.requires_grad and torch.is_grad_enabled():
            return "it has no gradients; run under torch.no_grad()"
        if module.has_bias or not module.is_concatenated or module.is_transposed:
            return "it knows experts without biases whose gate and up weights are two halves of [E, 2C, H]"
        if not is_plain(module):
            return "it knows the activation SiLU(gate) * up only"
        rows = packed_rows(module)
        if rows is None:
            return "its weights are not packed"
        if rows.down.dtype not in _DTYPES or x.dtype != rows.down.dtype or rows.gate_up.dtype != rows.down.dtype:
            return f"it knows bfloat16, float16 and fp32, the same everywhere, not {x.dtype} x {rows.down.dtype}"
        if rows.down.device != x.device:
            return f"its weights are on {rows.down.device}, the input is on {x.device}"
        return None

    def run(self, module: nn.Module, x: Tensor, selection: Selection, n: int, computed: Tensor | None = None) -> Tensor:
        """See ``Executor.run``; what a gate computed is computed again: splitting a block costs more."""
        rows = packed_rows(module)
        assert rows is not None  # refusal was asked
        pairs = len(selection.token)
        if not pairs:
            return torch.zeros_like(x)
        kernels = _kernels()
        experts, neurons, hidden = rows.down.shape
        groups, size, item = experts * n, neurons // n, x.element_size()
        x, token, weight = x.contiguous(), selection.token.contiguous(), selection.weight.contiguous()
        starts = _starts(selection.sub_expert, groups)
        shape = {"GROUPS": groups, "SIZE": size, "HIDDEN": hidden, "WIDTH": _power_of_two(groups)}
        activations, outputs = x.new_empty(pairs, size), x.new_empty(pairs, hidden)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            tile = Tile.of(pairs, groups, hidden, 32, item)
            kernels.activate[tile.grid(pairs, groups, size)](
                x, rows.gate_up, token, starts, activations, NEURONS=neurons, **shape, **_options(tile)
            )
            tile = Tile.of(pairs, groups, size, 64, item)
            kernels.project[tile.grid(pairs, groups, hidden)](
                activations, rows.down, weight, starts, outputs, **shape, **_options(tile)
            )
        return _added(outputs, token, x)

    def run_some(self, module: nn.Module, x: Tensor, selection: Selection, n: int, rule: NeuronRule) -> Tensor:
        """See ``Executor.run_some``; for blocks that ``skip_refusal`` takes."""
        rows = packed_rows(module)
        assert rows is not None  # refusal was asked
        pairs = len(selection.token)
        if not pairs:
            return torch.zeros_like(x)
        kernels = _block_kernels()
        experts, neurons, hidden = rows.down.shape
        groups, size, item, block = experts * n, neurons // n, x.element_size(), rule.block
        rule.check(size)
        x, token, weight = x.contiguous(), selection.token.contiguous(), selection.weight.contiguous()
        scale = rule.scale.to(x.device).contiguous()
        starts = _starts(selection.sub_expert, groups)
        shape = {"GROUPS": groups, "SIZE": size, "HIDDEN": hidden, "WIDTH": _power_of_two(groups)}
        activations, outputs = x.new_empty(pairs, size), x.new_empty(pairs, hidden)
        with torch.cuda.device_of(x):  # Triton launches on the current device
            inside = block & -block  # the largest power of two that divides it
            tile = Tile.of(pairs, groups, hidden, 32, item)
            tile = replace(tile, cols=min(tile.cols, inside))
            grid, options = tile.grid(pairs, groups, size), shape | {"NEURONS": neurons} | _options(tile)
            gates = torch.empty(pairs, size, device=x.device)
            score = torch.empty(pairs, size // tile.cols, device=x.device)
            kernels.score_gates[grid](x, rows.gate_up, token, weight, scale, starts, gates, score, **options)
            keep = kept_blocks(token, score.view(pairs, size // block, -1).sum(2), rule)
            kernels.multiply_up[grid](x, rows.gate_up, token, starts, gates, keep, activations, BLOCK=block, **options)
            tile = Tile.of(pairs, groups, size, 64, item)
            tile = replace(tile, depth=min(tile.depth, inside))
            kernels.project_blocks[tile.grid(pairs, groups, hidden)](
                activations, rows.down, starts, keep, outputs, BLOCK=block, **shape, **_options(tile)
            )
        return _added(outputs, token, x)


def kept_blocks(token: Tensor, score: Tensor, rule: NeuronRule) -> Tensor:
    """Which blocks run, int32 ``[S, B]``: a token's best over all of its pairs, the first ones among equals.

    Args:
        token: int64 ``[S]``.
        score: fp32 ``[S, B]``, of every block of every pair; NaN is kept like infinity.
        rule: how many, or from which score on.
    """
    score, count = score.nan_to_num(torch.inf, torch.inf), rule.blocks
    if count is None:
        return (score > rule.threshold).int()  # type: ignore[operator]
    best = torch.argsort(score.flatten(), descending=True, stable=True)
    owner = token.repeat_interleave(score.shape[1])[best]
    owner, by_token = torch.sort(owner, stable=True)
    rank = torch.arange(len(owner), device=owner.device) - torch.searchsorted(owner, owner)
    keep = torch.empty(len(owner), dtype=torch.int32, device=owner.device)
    keep[best[by_token]] = (rank < count.to(owner.device)[owner]).int()
    return keep.view_as(score)


def _added(outputs: Tensor, token: Tensor, x: Tensor) -> Tensor:
    """The sum of every token's pairs ``[S, H]``, shaped as ``x``; zero for a token that has none."""
    out, hidden = torch.empty_like(x), x.shape[1]
    by_token, order = torch.sort(token, stable=True)
    cols = min(256, _power_of_two(hidden))
    with torch.cuda.device_of(x):
        _kernels().add_pairs[(len(x), -(-hidden // cols))](
            outputs, order, _starts(by_token, len(x)), out, HIDDEN=hidden, ROWS=_PAIRS_ADDED_AT_ONCE, COLS=cols
        )
    return out


def device_refusal(device: torch.device) -> str | None:
    """Why the kernels cannot run on a device; None if they can."""
    if not _installed():
        return "Triton is not installed; on Linux: pip install 'moe-prism[triton]'"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "the input is on the CPU, where Triton has only an interpreter for tests (TRITON_INTERPRET=1)"
        if not _kernels().INTERPRETED:
            return "Triton was imported before TRITON_INTERPRET=1 was set; set it when the program starts"
        return None
    if device.type != "cuda":
        return f"the input is on {device}, it knows CUDA and ROCm devices"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"{device} has compute capability {capability[0]}.{capability[1]}, Triton needs 8.0 or newer"
    return None


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _kernels() -> Any:
    from . import triton_kernels

    return triton_kernels


@cache
def _block_kernels() -> Any:
    from . import triton_block_kernels

    return triton_block_kernels


def _starts(values: Tensor, count: int) -> Tensor:
    """Where each of 0..count begins in sorted values: int32 ``[count + 1]``. Unlike bincount, no host waits for it."""
    return torch.searchsorted(values, torch.arange(count + 1, device=values.device), out_int32=True)


def _options(tile: Tile) -> dict[str, Any]:
    return {
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "DEPTH": tile.depth,
        "WIDEN": _kernels().INTERPRETED,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _power_of_two(least: int) -> int:
    """The smallest power of two that is at least ``least`` and 16."""
    return max(16, 1 << (least - 1).bit_length())

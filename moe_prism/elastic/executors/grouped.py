"""Grouped matrix products over E*N virtual experts: the portable executor of accelerators.

The rows of a packed layer are already ``[E * N]`` blocks of ``C / N`` neurons, so the virtual experts are
views. There is no data-dependent host work beyond the selection itself. On a CPU torch loops over the
groups, so it is a baseline there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...experts.packing import packed_rows
from ..selection import Selection
from .base import EXECUTORS, Executor
from .bias import add_gate_up_bias


@EXECUTORS.register("grouped")
@dataclass(frozen=True)
class GroupedExecutor(Executor):
    """Two or three calls of ``torch.nn.functional.grouped_mm``."""

    def refusal(self, module: nn.Module, x: Tensor) -> str | None:
        """Needs packed rows whose length is a multiple of 16 bytes, which the kernel demands."""
        rows = packed_rows(module)
        if rows is None:
            return "its weights are not packed"
        if rows.down.shape[2] * rows.down.element_size() % 16 or x.dtype != rows.down.dtype:
            return f"rows of {rows.down.shape[2]} x {rows.down.dtype} are not aligned, or the input is {x.dtype}"
        return None

    def run(self, module: nn.Module, x: Tensor, selection: Selection, n: int, computed: Tensor | None = None) -> Tensor:
        """See ``Executor.run``; what a gate computed is computed again: splitting a block costs more."""
        rows = packed_rows(module)
        assert rows is not None  # refusal was asked
        experts, neurons, hidden = rows.down.shape
        blocks, size = experts * n, neurons // n
        ends = _ends(selection.sub_expert, blocks)
        tokens = x[selection.token]
        if module.is_concatenated:
            # gate blocks 0..n-1 of an expert, then its up blocks: every pair visits both
            block = selection.sub_expert // n * 2 * n + selection.sub_expert % n
            both = torch.cat([block, block + n])
            order = torch.argsort(both, stable=True)
            ends_both = _ends(both[order], 2 * blocks)
            weight = rows.gate_up.view(2 * blocks, size, hidden).transpose(1, 2)
            sorted_out = torch.nn.functional.grouped_mm(tokens.repeat(2, 1)[order], weight, offs=ends_both)
            projected = torch.empty_like(sorted_out).index_copy_(0, order, sorted_out)
            projected = torch.cat(projected.chunk(2), dim=1)
        else:
            weight = rows.gate_up.view(blocks, 2 * size, hidden).transpose(1, 2)
            projected = torch.nn.functional.grouped_mm(tokens, weight, offs=ends)
        applied = module._apply_gate(add_gate_up_bias(module, projected, selection, n))  # type: ignore[operator]
        product = torch.nn.functional.grouped_mm(_aligned(applied), rows.down.view(blocks, size, hidden), offs=ends)
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        out.index_add_(0, selection.token, product.float() * selection.weight[:, None].float())
        return out.to(x.dtype)


def _ends(values: Tensor, count: int) -> Tensor:
    """Where each of ``0 .. count - 1`` ends in sorted values: int32 ``[count]``; no host waits for it."""
    return torch.searchsorted(values, torch.arange(count, device=values.device), right=True, out_int32=True)


def _aligned(x: Tensor) -> Tensor:
    """The same values with rows that begin at multiples of 16 bytes, as the kernel demands."""
    odd = -x.shape[1] % (16 // x.element_size())
    return torch.nn.functional.pad(x, (0, odd))[:, : x.shape[1]] if odd else x

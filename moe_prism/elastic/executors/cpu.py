"""The fast executor of CPUs: compiled kernels over packed rows, fp32 arithmetic on weights as stored.

A selected sub-expert is three runs of contiguous rows, so its cost is its bytes. Knows bfloat16 and fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...experts.packing import PackedRows, packed_rows
from ..kernels import add_rows, multiply_rows
from ..selection import Selection
from .base import EXECUTORS, Executor
from .bias import add_gate_up_bias

_DTYPES = (torch.bfloat16, torch.float32)


def as_rows(weight: Tensor) -> NDArray[np.generic]:
    """A contiguous weight as NumPy rows ``[R, H]``: fp32, or the bits of bfloat16. No copy."""
    flat = weight.reshape(-1, weight.shape[-1])
    bits: NDArray[np.generic]
    bits = flat.view(torch.int16).numpy().view(np.uint16) if weight.dtype == torch.bfloat16 else flat.numpy()
    return bits


@dataclass(frozen=True)
class Groups:
    """The sub-experts of a selection and their runs of pairs.

    Attributes:
        token: int64 ``[S]``.
        starts: int64 ``[G + 1]``.
        expert, part: int64 ``[G]``.
    """

    token: NDArray[np.int64]
    starts: NDArray[np.int64]
    expert: NDArray[np.int64]
    part: NDArray[np.int64]

    @classmethod
    def of(cls, selection: Selection, n: int) -> Groups:
        """Group a selection, which is sorted by sub-expert."""
        sub_expert = selection.sub_expert.numpy()
        changes = np.flatnonzero(np.diff(sub_expert)) + 1
        starts = np.concatenate([[0], changes, [len(sub_expert)]]) if len(sub_expert) else np.zeros(1, np.int64)
        expert, part = np.divmod(sub_expert[starts[:-1]], n)
        return cls(selection.token.numpy(), starts, expert, part)


@EXECUTORS.register("cpu")
@dataclass(frozen=True)
class CpuExecutor(Executor):
    """Numba kernels on torch's number of threads."""

    def refusal(self, module: nn.Module, x: Tensor) -> str | None:
        """Needs packed bfloat16 or fp32 weights in CPU memory."""
        if x.device.type != "cpu":
            return f"the input is on {x.device}"
        if x.requires_grad and torch.is_grad_enabled():
            return "it has no gradients; run under torch.no_grad()"
        rows = packed_rows(module)
        if rows is None:
            return "its weights are not packed"
        if rows.down.dtype not in _DTYPES:
            return f"it knows bfloat16 and fp32 weights, not {rows.down.dtype}"
        return None

    def run(self, module: nn.Module, x: Tensor, selection: Selection, n: int, computed: Tensor | None = None) -> Tensor:
        """See ``Executor.run``."""
        rows = packed_rows(module)
        assert rows is not None  # refusal was asked
        groups = Groups.of(selection, n)
        skipped = 0 if computed is None else computed.shape[3]
        projected = project(module, rows, x, groups, n, skipped)
        hidden: Tensor = module._apply_gate(add_gate_up_bias(module, projected, selection, n, skipped))  # type: ignore[operator]
        if computed is not None:
            known = computed[selection.token, selection.slot, selection.sub_expert % n]
            hidden = torch.cat([known.float(), hidden], dim=1)
        hidden = hidden * selection.weight[:, None].float()
        out = torch.zeros(x.shape, dtype=torch.float32)
        size = rows.down.shape[1] // n
        first = groups.expert * rows.down.shape[1] + groups.part * size
        add_rows(as_rows(rows.down), hidden.numpy(), groups.token, groups.starts, first, size, out.numpy())
        return out.to(x.dtype)


def project(
    module: nn.Module, rows: PackedRows, x: Tensor, groups: Groups, n: int, skipped: int = 0, wanted: int | None = None
) -> Tensor:
    """Gate and up projections of grouped pairs, laid out for ``_apply_gate``.

    Args:
        module: stacked experts.
        rows: its packed rows.
        x: ``[T, H]``.
        groups: what to run.
        n: sub-experts of one expert.
        skipped: leading neurons of every sub-expert to leave out.
        wanted: neurons after those; all by default.

    Returns:
        fp32 ``[S, 2c]``.
    """
    neurons = rows.down.shape[1]
    size = neurons // n
    count = size - skipped if wanted is None else wanted
    begin = groups.part * size + skipped
    tokens = x.float().contiguous().numpy()
    out = torch.empty(len(groups.token), 2 * count)
    if module.is_concatenated:
        first, parts, run = groups.expert * 2 * neurons + begin, 2, count
    else:  # gate and up rows of a neuron are neighbours
        first, parts, run = groups.expert * 2 * neurons + 2 * begin, 1, 2 * count
    multiply_rows(as_rows(rows.gate_up), tokens, groups.token, groups.starts, first, parts, neurons, run, out.numpy())
    return out

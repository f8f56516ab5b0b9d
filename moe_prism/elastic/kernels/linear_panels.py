"""A matrix in panels times tokens, in bfloat16 (see ``gated_panels`` for what a panel is). Knows arrays only."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .compiled import parallel, round_into, serial
from .dots import COLUMNS
from .gated_panels import ROW, TOGETHER, add_products
from .threads import Kernel

Array = Any


@serial
def multiply_blocks(weight: Array, x: Array, bias: Array, first: int, last: int, out: Array) -> None:
    """Columns ``64 * first .. 64 * last`` of ``linear_panels``, into those of ``out``."""
    tokens, size = x.shape
    every, sums = np.arange(tokens), np.empty((TOGETHER, COLUMNS), np.float32)
    for block in range(first, last):
        at, column = weight[block].ctypes.data, COLUMNS * block
        for s0 in range(0, tokens, TOGETHER):
            s1 = min(s0 + TOGETHER, tokens)
            for s in range(s1 - s0):
                sums[s] = bias[column : column + COLUMNS]
            outs = sums.ctypes.data - ROW * s0
            add_products(at, size // 2, x.ctypes.data, 2 * size, every, outs, ROW, every, s0, s1)
            for s in range(s0, s1):
                round_into(sums[s - s0], out[s, column : column + COLUMNS])


def _linear_panels(threads: int, weight: Array, x: Array, bias: Array) -> Array:
    blocks = weight.shape[0]
    out = np.empty((x.shape[0], blocks * COLUMNS), np.uint16)
    for thread in numba.prange(threads):
        multiply_blocks(weight, x, bias, blocks * thread // threads, blocks * (thread + 1) // threads, out)
    return out


linear_panels = Kernel(serial(_linear_panels), parallel(_linear_panels))
"""``x W^T + b``; sums in fp32, rounded once.

Called with: weight uint32 ``[O / 64, I / 2, 64]``; x ``[T, I]``, bits of bfloat16, contiguous; bias fp32 ``[O]``. I is
even, O a multiple of 64. Returns bits of bfloat16 ``[T, O]``. A token's result depends neither on the other tokens nor
on the number of threads. Only where ``dots.has_products_of_pairs``.
"""

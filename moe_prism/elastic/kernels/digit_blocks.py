"""Sub-experts stored as 4-bit digits, gate, up and down rows together, some of a layer's at a time.

What comes out of a pair does not depend on which others are computed in the same call, nor on the number of threads:
every sub-expert's down projection is two sums of fixed halves. For few tokens: a row is unpacked once for each. Knows
the digits of ``experts.shadow``, the usual activation only, and no biases.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .compiled import parallel, serial
from .digit_rows import add_digits, dot_digits
from .silu import silu
from .threads import Kernel

Array = Any


def _digit_blocks(
    threads: int,
    digits: Array,
    scales: Array,
    x: Array,
    token: Array,
    weight: Array,
    at: Array,
    slot: Array,
    size: int,
    out: Array,
) -> None:
    pairs, hidden, sixteen = at.shape[0], x.shape[1], np.float32(16)
    half = hidden // 2  # bytes of a row's digits; its scales follow, and then the next row
    row_bytes = half + hidden // 16
    active = np.empty((pairs, size), np.float32)
    for thread in numba.prange(threads):
        for i in range(thread * pairs * size // threads, (thread + 1) * pairs * size // threads):
            pair, c = i // size, i % size
            block, block_scales, v = digits[slot[pair]], scales[slot[pair]], x[token[at[pair]]]
            gate, up = c * row_bytes, (size + c) * row_bytes
            g = sixteen * dot_digits(
                block[gate : gate + half], block_scales[(gate + half) // 2 : (gate + row_bytes) // 2], v
            )
            u = sixteen * dot_digits(block[up : up + half], block_scales[(up + half) // 2 : (up + row_bytes) // 2], v)
            active[pair, c] = sixteen * (weight[at[pair]] * silu(g) * u)
    halves = np.zeros((2 * pairs, hidden), np.float32)
    for thread in numba.prange(threads):
        for task in range(thread * 2 * pairs // threads, (thread + 1) * 2 * pairs // threads):
            pair, second = task // 2, task % 2
            block, block_scales, y = digits[slot[pair]], scales[slot[pair]], halves[task]
            for c in range(second * (size // 2), size if second else size // 2):
                row = (2 * size + c) * row_bytes
                add_digits(
                    y,
                    active[pair, c],
                    block[row : row + half],
                    block_scales[(row + half) // 2 : (row + row_bytes) // 2],
                )
    for pair in range(pairs):
        for h in range(hidden):
            out[at[pair], h] = halves[2 * pair, h] + halves[2 * pair + 1, h]


digit_blocks = Kernel(serial(_digit_blocks), parallel(_digit_blocks))
"""Gate and up projections, activation and down projection of some sub-experts, read at 4 bits.

Called with: digits uint8 ``[slots, stride]``, whose rows are upper digits ``[H / 2]`` and the scales of their groups
(the bits of bfloat16) ``[H / 32]``, C / N of gate, then of up, then of down; scales, the same memory as uint16
``[slots, stride / 2]``; x fp32 ``[T, H]``; token int64 ``[S]`` and weight fp32 ``[S]`` of all pairs; at int64 ``[P]``,
the pairs to compute; slot int64 ``[P]``, where each one's block is; size: neurons of a sub-expert; out fp32
``[S, H]``, of which the rows ``at`` are written.
"""

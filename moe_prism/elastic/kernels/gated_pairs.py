"""A layer of SiLU-gated sub-experts in bfloat16 for many tokens, by products of bfloat16 pairs.

The same as ``gated``, from a few tokens per sub-expert on, where arithmetic and no longer the reading of weights takes
the time; activations are rounded to bfloat16 before the down projection, as in a model that runs in bfloat16. Knows the
usual activation only, and no biases.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .compiled import narrow, parallel, serial, share_tasks
from .dots import COLUMNS, TILE, dot_tile, sum_tile
from .gated import activate, run_starts, total
from .threads import Kernel

Array = Any
BLOCK = 64  # neurons of a task
LENGTH = COLUMNS  # what the hidden size must be a multiple of
ROWS = TILE  # and the neurons of a sub-expert


@serial
def project(
    rows: Array, row: int, count: int, x: Array, token: Array, s0: int, s1: int, out: Array, column: int
) -> None:
    """``count`` rows times the tokens ``s0 .. s1`` of a group, into columns of ``out``."""
    hidden, width = rows.shape[1], out.shape[1]
    spare = np.empty(TILE, np.float32)
    tokens, outs, nowhere = x.ctypes.data, out.ctypes.data, spare.ctypes.data
    for s in range(s0, s1, TILE):
        left = s1 - s
        a = tokens + 2 * hidden * token[s]
        b = tokens + 2 * hidden * token[s + min(1, left - 1)]
        c = tokens + 2 * hidden * token[s + min(2, left - 1)]
        d = tokens + 2 * hidden * token[s + min(3, left - 1)]
        for r in range(0, count, TILE):
            at = outs + 4 * (s * width + column + r)
            dot_tile(
                rows.ctypes.data + 2 * hidden * (row + r),
                2 * hidden,
                (a, b, c, d),
                (
                    at,
                    at + 4 * width if left > 1 else nowhere,
                    at + 8 * width if left > 2 else nowhere,
                    at + 12 * width if left > 3 else nowhere,
                ),
                hidden,
            )
    spare[0] = 0  # alive until here


@serial
def interleave(rows: Array, row: int, count: int, out: Array) -> None:
    """Pairs of consecutive rows as words: the first in the lower half."""
    for p in range(count // 2):
        low, high, pair = rows[row + 2 * p], rows[row + 2 * p + 1], out[p]
        for h in range(low.shape[0]):
            pair[h] = np.uint32(low[h]) | (np.uint32(high[h]) << np.uint32(16))


@serial
def add_pairs_of_rows(
    pairs: Array, count: int, active: Array, begin: int, token: Array, s0: int, s1: int, out: Array
) -> None:
    """The first ``count`` row pairs, weighted by columns of ``active`` from ``begin`` on, added to a group's tokens."""
    hidden, width = out.shape[1], active.shape[1]
    spare = np.empty(COLUMNS, np.float32)
    weights, outs, nowhere = active.ctypes.data + 2 * begin, out.ctypes.data, spare.ctypes.data
    for j in range(0, hidden, COLUMNS):
        for s in range(s0, s1, TILE):
            left, w = s1 - s, weights + 2 * width * s
            sum_tile(
                pairs.ctypes.data + 4 * j,
                4 * hidden,
                (
                    w,
                    w + 2 * width * min(1, left - 1),
                    w + 2 * width * min(2, left - 1),
                    w + 2 * width * min(3, left - 1),
                ),
                (
                    outs + 4 * (hidden * token[s] + j),
                    outs + 4 * (hidden * token[s + 1] + j) if left > 1 else nowhere,
                    outs + 4 * (hidden * token[s + 2] + j) if left > 2 else nowhere,
                    outs + 4 * (hidden * token[s + 3] + j) if left > 3 else nowhere,
                ),
                count,
            )
    spare[0] = 0  # alive until here


def _gated_pairs(
    threads: int,
    gate_up: Array,
    down: Array,
    x: Array,
    token: Array,
    sub_expert: Array,
    weight: Array,
    neurons: int,
    n: int,
) -> Array:
    pairs, size, hidden = token.shape[0], neurons // n, x.shape[1]
    starts, known = run_starts(sub_expert), np.empty((0, 0), np.float32)
    projected = np.empty((pairs, 2 * size), np.float32)
    active = np.empty((pairs, size), np.uint16)
    runs = (size + BLOCK - 1) // BLOCK
    both = share_tasks(starts, runs, 2, threads)
    for thread in numba.prange(threads):
        for task in range(both[thread], both[thread + 1]):
            group, part, begin = task // (2 * runs), task // runs % 2, task % runs * BLOCK
            which, count = sub_expert[starts[group]], min(BLOCK, size - begin)
            row = which // n * 2 * neurons + part * neurons + which % n * size + begin
            project(gate_up, row, count, x, token, starts[group], starts[group + 1], projected, part * size + begin)
    bounds = share_tasks(starts, runs, 1, threads)
    sums = np.zeros((threads, x.shape[0], hidden), np.float32)
    for thread in numba.prange(threads):
        words = np.empty((BLOCK // 2, hidden), np.uint32)
        for task in range(bounds[thread], bounds[thread + 1]):
            group, begin = task // runs, task % runs * BLOCK
            s0, s1, count = starts[group], starts[group + 1], min(BLOCK, size - begin)
            activate(projected, weight, known, begin, begin + count, s0, s1)
            for s in range(s0, s1):
                for c in range(begin, begin + count):
                    active[s, c] = narrow(projected[s, c], active[s, c])
            interleave(down, sub_expert[s0] * size + begin, count, words)
            add_pairs_of_rows(words, count // 2, active, begin, token, s0, s1, sums[thread])
    return total(sums, x)


gated_pairs = Kernel(serial(_gated_pairs), parallel(_gated_pairs))
"""Gate and up projections, activation and down projection of selected sub-experts.

Called as ``gated_experts``, without ``known``: gate_up, down and x are uint16 bits of bfloat16, contiguous, H a
multiple of ``LENGTH`` and ``neurons / n`` of ``ROWS``. Only where ``dots.has_products_of_pairs``.
"""

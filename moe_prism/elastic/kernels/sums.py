"""Weighted sums of rows: the down projection, one row a neuron.

Every thread reads whole rows, as one stream, into sums of its own, which are added in the end: reading halves
of rows took a third longer. So the order of additions depends on the number of threads, by rounding only.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .compiled import RUN, parallel, serial, share_tasks
from .micro import add_4_rows_2_tokens, add_row
from .streams import add_4_rows
from .threads import Kernel

Array = Any
# A tile of two tokens' sums stays in the first-level cache while all rows of a group pass by.
_TILE = 512


@serial
def _add_to_one(rows: Array, row: int, count: int, w: Array, y: Array) -> None:
    c = 0
    while c + 4 <= count:
        r = row + c
        four = (w[c], w[c + 1], w[c + 2], w[c + 3])
        add_4_rows(y, four, rows, (r, r + 1, r + 2, r + 3), (r + 4, r + 5, r + 6, r + 7))
        c += 4
    while c < count:
        add_row(y, w[c], rows[row + c])
        c += 1


@serial
def _add_to_two(rows: Array, row: int, count: int, w: Array, v: Array, y: Array, z: Array, j0: int, j1: int) -> None:
    c = 0
    while c + 4 <= count:
        r = row + c
        add_4_rows_2_tokens(
            y, z, w[c : c + 4], v[c : c + 4],
            rows[r, j0:j1], rows[r + 1, j0:j1], rows[r + 2, j0:j1], rows[r + 3, j0:j1],
        )  # fmt: skip
        c += 4
    while c < count:
        add_row(y, w[c], rows[row + c, j0:j1])
        add_row(z, v[c], rows[row + c, j0:j1])
        c += 1


@serial
def add_run(rows: Array, row: int, count: int, weight: Array, token: Array, s0: int, s1: int, out: Array) -> None:
    """``count`` consecutive rows, weighted by ``weight[s]``, added to the tokens ``s0 .. s1`` of a group."""
    hidden = rows.shape[1]
    paired = s0 + (s1 - s0) // 2 * 2
    for j0 in range(0, hidden if paired > s0 else 0, _TILE):
        j1 = min(j0 + _TILE, hidden)
        for s in range(s0, paired, 2):
            y, z = out[token[s], j0:j1], out[token[s + 1], j0:j1]
            _add_to_two(rows, row, count, weight[s], weight[s + 1], y, z, j0, j1)
    if paired < s1:
        _add_to_one(rows, row, count, weight[paired], out[token[paired]])


def _add_rows(
    threads: int, rows: Array, weight: Array, token: Array, starts: Array, first: Array, count: int, out: Array
) -> None:
    hidden = rows.shape[1]
    runs = (count + RUN - 1) // RUN
    bounds = share_tasks(starts, runs, 1, threads)
    sums = np.zeros((threads, out.shape[0], hidden), np.float32)
    for thread in numba.prange(threads):
        mine = sums[thread]
        for task in range(bounds[thread], bounds[thread + 1]):
            group, begin = task // runs, task % runs * RUN
            row, rest = first[group] + begin, min(RUN, count - begin)
            add_run(rows, row, rest, weight[:, begin:], token, starts[group], starts[group + 1], mine)
    for thread in range(threads):
        out += sums[thread]


add_rows = Kernel(serial(_add_rows), parallel(_add_rows))
"""Groups of consecutive rows, weighted per token, added to the tokens of each group.

Called with: rows ``[R, H]`` (uint16 bits of bfloat16, or fp32); weight fp32 ``[S, count]``; token int64 ``[S]``, sorted
by group, no token twice in a group; starts int64 ``[G + 1]``; first int64 ``[G]``; count: rows of every group; out
fp32 ``[T, H]``, added to.
"""


@serial
def add_pairs(out: Array, token: Array, values: Array) -> None:
    """Add every pair's values to its token's, in order: fp32 ``out[token[p]] += values[p]``, ``[T, H]`` and ``[P, H]``.

    On the caller's thread: waking another takes longer.
    """
    for pair in range(token.shape[0]):
        y, mine = out[token[pair]], values[pair]
        for h in range(y.shape[0]):
            y[h] += mine[h]

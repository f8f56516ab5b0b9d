"""Weighted sums of rows: the down projection, one row a neuron.

Threads share the columns, never a sum, so the order of additions does not depend on their number. A thread
takes at least 64 columns: with more threads than ``H / 64`` the rest have nothing to do.
"""

from __future__ import annotations

from typing import Any

import numba

from .compiled import parallel, serial
from .micro import add_4_rows_2_tokens, add_8_rows, add_row
from .threads import Kernel

Array = Any
_COLUMNS = 64
# A tile of two tokens' sums stays in the first-level cache while all rows of a group pass by.
_TILE = 512


@serial
def _add_to_one(rows: Array, row: int, count: int, w: Array, y: Array, j0: int, j1: int) -> None:
    c = 0
    while c + 8 <= count:
        r = row + c
        add_8_rows(
            y, w[c : c + 8],
            rows[r, j0:j1], rows[r + 1, j0:j1], rows[r + 2, j0:j1], rows[r + 3, j0:j1],
            rows[r + 4, j0:j1], rows[r + 5, j0:j1], rows[r + 6, j0:j1], rows[r + 7, j0:j1],
        )  # fmt: skip
        c += 8
    while c < count:
        add_row(y, w[c], rows[row + c, j0:j1])
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


def _add_rows(
    threads: int, rows: Array, weight: Array, token: Array, starts: Array, first: Array, count: int, out: Array
) -> None:
    hidden = rows.shape[1]
    slabs = max(1, min(threads, hidden // _COLUMNS))
    for slab in numba.prange(slabs):
        begin, end = slab * hidden // slabs, (slab + 1) * hidden // slabs
        for group in range(first.shape[0]):
            s0, s1 = starts[group], starts[group + 1]
            tile = end - begin if s1 - s0 == 1 else _TILE
            for j0 in range(begin, end, tile):
                j1 = min(j0 + tile, end)
                s = s0
                while s + 2 <= s1:
                    y, z = out[token[s], j0:j1], out[token[s + 1], j0:j1]
                    _add_to_two(rows, first[group], count, weight[s], weight[s + 1], y, z, j0, j1)
                    s += 2
                if s < s1:
                    _add_to_one(rows, first[group], count, weight[s], out[token[s], j0:j1], j0, j1)


def _add_some_rows(threads: int, rows: Array, weight: Array, row: Array, token: Array, out: Array) -> None:
    hidden = rows.shape[1]
    slabs = max(1, min(threads, hidden // _COLUMNS))
    for slab in numba.prange(slabs):
        j0, j1 = slab * hidden // slabs, (slab + 1) * hidden // slabs
        i = 0
        while i < row.shape[0]:
            y = out[token[i], j0:j1]
            if i + 8 <= row.shape[0] and token[i] == token[i + 7]:
                add_8_rows(
                    y, weight[i : i + 8],
                    rows[row[i], j0:j1], rows[row[i + 1], j0:j1], rows[row[i + 2], j0:j1], rows[row[i + 3], j0:j1],
                    rows[row[i + 4], j0:j1], rows[row[i + 5], j0:j1], rows[row[i + 6], j0:j1], rows[row[i + 7], j0:j1],
                )  # fmt: skip
                i += 8
            else:
                add_row(y, weight[i], rows[row[i], j0:j1])
                i += 1


add_rows = Kernel(serial(_add_rows), parallel(_add_rows))
"""Groups of consecutive rows, weighted per token, added to the tokens of each group.

Called with: rows ``[R, H]`` (uint16 bits of bfloat16, or fp32); weight fp32 ``[S, count]``; token int64 ``[S]``, sorted
by group, no token twice in a group; starts int64 ``[G + 1]``; first int64 ``[G]``; count: rows of every group; out
fp32 ``[T, H]``, added to.
"""

add_some_rows = Kernel(serial(_add_some_rows), parallel(_add_some_rows))
"""Single weighted rows added to one token each.

Called with: rows ``[R, H]``; weight fp32 ``[P]``; row int64 ``[P]``; token int64 ``[P]``, equal ones together; out
fp32 ``[T, H]``, added to.
"""

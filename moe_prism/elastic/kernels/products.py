"""Rows of weights times tokens: gate and up projections, and any linear layer of a decode step.

Work is split over runs of rows, so every output is computed whole by one thread and does not depend on how
many there are.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .compiled import RUN, narrow, parallel, serial, share_tasks, widen
from .micro import dot, dot_2_rows_2_tokens, dot_2_rows_4_tokens
from .streams import dot_4_rows
from .threads import Kernel

Array = Any


@serial
def widened(x: Array) -> Array:
    """Tokens as fp32."""
    out = np.empty(x.shape, np.float32)
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            out[t, h] = widen(x[t, h])
    return out


@serial
def multiply_run(
    rows: Array, row: int, count: int, x: Array, token: Array, s0: int, s1: int, out: Array, column: int
) -> None:
    """``count`` consecutive rows times the tokens ``s0 .. s1`` of a group, into columns of ``out``."""
    s = s0
    while s + 4 <= s1:
        x0, x1, x2, x3 = x[token[s]], x[token[s + 1]], x[token[s + 2]], x[token[s + 3]]
        r = 0
        while r + 2 <= count:
            o = column + r
            a0, a1, a2, a3, b0, b1, b2, b3 = dot_2_rows_4_tokens(rows[row + r], rows[row + r + 1], x0, x1, x2, x3)
            out[s, o], out[s + 1, o], out[s + 2, o], out[s + 3, o] = a0, a1, a2, a3
            out[s, o + 1], out[s + 1, o + 1], out[s + 2, o + 1], out[s + 3, o + 1] = b0, b1, b2, b3
            r += 2
        if r < count:
            for q in range(4):
                out[s + q, column + r] = dot(rows[row + r], x[token[s + q]])
        s += 4
    while s + 2 <= s1:
        x0, x1 = x[token[s]], x[token[s + 1]]
        r = 0
        while r + 2 <= count:
            o = column + r
            out[s, o], out[s, o + 1], out[s + 1, o], out[s + 1, o + 1] = dot_2_rows_2_tokens(
                rows[row + r], rows[row + r + 1], x0, x1
            )
            r += 2
        if r < count:
            out[s, column + r] = dot(rows[row + r], x0)
            out[s + 1, column + r] = dot(rows[row + r], x1)
        s += 2
    if s < s1:
        v = x[token[s]]
        r = 0
        while r + 4 <= count:
            o, i = column + r, row + r
            out[s, o], out[s, o + 1], out[s, o + 2], out[s, o + 3] = dot_4_rows(
                rows, (i, i + 1, i + 2, i + 3), (i + 4, i + 5, i + 6, i + 7), v
            )
            r += 4
        while r < count:
            out[s, column + r] = dot(rows[row + r], v)
            r += 1


def _multiply_rows(
    threads: int,
    rows: Array,
    x: Array,
    token: Array,
    starts: Array,
    first: Array,
    parts: int,
    stride: int,
    count: int,
    out: Array,
) -> None:
    runs = (count + RUN - 1) // RUN
    bounds = share_tasks(starts, runs, parts, threads)
    for thread in numba.prange(threads):
        for task in range(bounds[thread], bounds[thread + 1]):
            group = task // (parts * runs)
            part = task // runs % parts
            begin = task % runs * RUN
            multiply_run(
                rows,
                first[group] + part * stride + begin,
                min(RUN, count - begin),
                x,
                token,
                starts[group],
                starts[group + 1],
                out,
                part * count + begin,
            )


multiply_rows = Kernel(serial(_multiply_rows), parallel(_multiply_rows))
"""Groups of consecutive rows times the tokens of each group.

Called with: rows ``[R, H]`` (uint16 bits of bfloat16, or fp32); x fp32 ``[T, H]``; token int64 ``[S]``, sorted by
group; starts int64 ``[G + 1]``, where each group begins in ``token``; first int64 ``[G]``, each group's first row;
parts, stride, count: a group is ``parts`` runs of ``count`` rows, ``stride`` rows apart; out fp32
``[S, parts * count]``.
"""


def _multiply_all(threads: int, rows: Array, x: Array) -> Array:
    count, stop = rows.shape[0], x.shape[0]
    tokens, token = widened(x), np.arange(stop)
    sums = np.empty((stop, count), np.float32)
    out = np.empty((stop, count), x.dtype)
    runs = (count + RUN - 1) // RUN
    for thread in numba.prange(threads):
        for run in range(thread * runs // threads, (thread + 1) * runs // threads):
            begin, end = run * RUN, min((run + 1) * RUN, count)
            multiply_run(rows, begin, end - begin, tokens, token, 0, stop, sums, begin)
            for t in range(stop):
                for r in range(begin, end):
                    out[t, r] = narrow(sums[t, r], x[0, 0])
    return out


multiply_all = Kernel(serial(_multiply_all), parallel(_multiply_all))
"""All rows times all tokens, in one call: what is small between two kernels is slow (see ``gated``).

Called with: rows ``[R, H]`` (uint16 bits of bfloat16, or fp32); x ``[T, H]``, either, T at least 1. Returns
``[T, R]`` in the dtype of x, rounded once.
"""

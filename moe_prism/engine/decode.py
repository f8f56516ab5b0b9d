"""Attention of requests that decode, on a CPU: one compiled call for all of them.

Each has one query and a run of keys and values, which are read where they lie. A call of torch's attention for every
request and layer costs more than the attention itself. Knows no layers and no requests, only places.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..elastic.executors.rows import as_rows, from_rows
from ..elastic.kernels.compiled import inner, parallel, round_into, serial, widen
from ..elastic.kernels.micro import add_row, dot
from ..elastic.kernels.silu import exponential
from ..elastic.kernels.streams import add_4_rows, dot_4_rows
from ..elastic.kernels.threads import Kernel

Array = Any
Ints = NDArray[np.int64]


@inner
def _widen_into(values: Array, out: Array) -> None:
    for i in range(out.shape[0]):
        out[i] = widen(values[i])


@inner
def _exponentials(scores: Array, most: float) -> Any:
    """``e^(score - most)`` in place of every score, and their sum; NaN stays."""
    total = np.float32(0)
    for i in range(scores.shape[0]):
        less = scores[i] - most
        power = exponential(less)
        scores[i] = power if less == less else less
        total += scores[i]
    return total


@serial
def _scores_of(query: Array, keys: Array, first: int, scale: float, scores: Array) -> Any:
    """Products of a query with the keys from row ``first`` on, into ``scores`` ``[L]``; returns the largest."""
    most = np.float32(-np.inf)
    i, length = 0, scores.shape[0]
    while i + 4 <= length:
        r = first + i
        four = dot_4_rows(keys, (r, r + 1, r + 2, r + 3), (r + 4, r + 5, r + 6, r + 7), query)
        for j in range(4):
            scores[i + j] = scale * four[j]
            most = max(most, scores[i + j])
        i += 4
    while i < length:
        scores[i] = scale * dot(keys[first + i], query)
        most = max(most, scores[i])
        i += 1
    return most


@serial
def _mean_of(weights: Array, total: float, values: Array, first: int, out: Array) -> None:
    """Weighted mean of the values from row ``first`` on, into ``out`` ``[V]``."""
    out[:] = 0
    i, length = 0, weights.shape[0]
    while i + 4 <= length:
        r = first + i
        four = (weights[i], weights[i + 1], weights[i + 2], weights[i + 3])
        add_4_rows(out, four, values, (r, r + 1, r + 2, r + 3), (r + 4, r + 5, r + 6, r + 7))
        i += 4
    while i < length:
        add_row(out, weights[i], values[first + i])
        i += 1
    for v in range(out.shape[0]):
        out[v] /= total


@serial
def attend_some(
    query: Array,
    keys: Array,
    values: Array,
    tokens: int,
    start: Array,
    length: Array,
    scale: float,
    first: int,
    step: int,
    out: Array,
) -> None:
    """Every ``step``-th (request, head) from ``first`` on; see ``attend``, whose arrays have two dimensions here."""
    requests = start.shape[0]
    size, value_size = keys.shape[1], values.shape[1]
    heads = query.shape[1] // size
    group = heads * tokens // keys.shape[0]
    longest = 0
    for r in range(requests):
        longest = max(longest, length[r])
    scores, asked = np.empty(longest, np.float32), np.empty(size, np.float32)
    mean = np.empty(value_size, np.float32)
    for task in range(first, requests * heads, step):
        r, h = task // heads, task % heads
        _widen_into(query[r, h * size : (h + 1) * size], asked)
        row, mine = h // group * tokens + start[r], scores[: length[r]]
        most = _scores_of(asked, keys, row, scale, mine)
        _mean_of(mine, _exponentials(mine, most), values, row, mean)
        round_into(mean, out[r, h * value_size : (h + 1) * value_size])


def _attend(
    threads: int, query: Array, keys: Array, values: Array, tokens: int, start: Array, length: Array, scale: float
) -> Array:
    heads = query.shape[1] // keys.shape[1]
    out = np.empty((query.shape[0], heads * values.shape[1]), query.dtype)
    for thread in numba.prange(threads):
        attend_some(query, keys, values, tokens, start, length, scale, thread, threads, out)
    return out


_kernel = Kernel(serial(_attend), parallel(_attend))


def attend(query: Tensor, keys: Tensor, values: Tensor, start: Ints, length: Ints, scale: float) -> Tensor:
    """Every request's query over its own places.

    Args:
        query: ``[R, query heads, D]``, fp32 or bfloat16, on the CPU like all others.
        keys: ``[heads, tokens, D]``, same dtype, contiguous.
        values: ``[heads, tokens, V]``.
        start: int64 ``[R]``, first place of each.
        length: int64 ``[R]``, places of each, at least 1.
        scale: of the products.

    Returns:
        ``[R, query heads, V]`` in the dtype of the query; sums are fp32.
    """
    flat = query.reshape(len(query), -1).contiguous()
    places = np.ascontiguousarray(start), np.ascontiguousarray(length)
    out = _kernel(as_rows(flat), as_rows(keys), as_rows(values), keys.shape[1], *places, np.float32(scale))
    return from_rows(out, query).view(len(query), query.shape[1], -1)

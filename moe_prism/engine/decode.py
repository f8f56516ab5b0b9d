"""Attention of requests that decode, on a CPU: two compiled calls for all of them, with torch's exponential between.

Each has one query and a run of keys and values, which are read where they lie. A call of torch's attention for every
request and layer costs more than the attention itself. Knows no layers and no requests, only places.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..elastic.kernels.compiled import parallel, serial
from ..elastic.kernels.micro import add_row, dot
from ..elastic.kernels.streams import add_4_rows, dot_4_rows
from ..elastic.kernels.threads import Kernel

Array = Any
Ints = NDArray[np.int64]


@serial
def _scores_of(query: Array, keys: Array, first: int, scale: float, scores: Array) -> None:
    """Products of a query with the keys from row ``first`` on, less the largest, into ``scores`` ``[L]``."""
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
    for i in range(length):
        scores[i] -= most


@serial
def _mean_of(weights: Array, values: Array, first: int, out: Array) -> None:
    """Weighted mean of the values from row ``first`` on, into ``out`` ``[V]``, which is zero."""
    total = np.float32(0)
    i, length = 0, weights.shape[0]
    while i + 4 <= length:
        r = first + i
        four = (weights[i], weights[i + 1], weights[i + 2], weights[i + 3])
        add_4_rows(out, four, values, (r, r + 1, r + 2, r + 3), (r + 4, r + 5, r + 6, r + 7))
        total += four[0] + four[1] + four[2] + four[3]
        i += 4
    while i < length:
        add_row(out, weights[i], values[first + i])
        total += weights[i]
        i += 1
    for v in range(out.shape[0]):
        out[v] /= total


def _score(
    threads: int, query: Array, keys: Array, tokens: int, start: Array, ends: Array, scale: float, scores: Array
) -> None:
    heads = query.shape[1]
    group = heads * tokens // keys.shape[0]
    for thread in numba.prange(threads):
        for task in range(thread, query.shape[0] * heads, threads):
            r, h = task // heads, task % heads
            _scores_of(query[r, h], keys, h // group * tokens + start[r], scale, scores[h, ends[r] : ends[r + 1]])


def _mean(threads: int, weights: Array, values: Array, tokens: int, start: Array, ends: Array, out: Array) -> None:
    heads = out.shape[1]
    group = heads * tokens // values.shape[0]
    for thread in numba.prange(threads):
        for task in range(thread, out.shape[0] * heads, threads):
            r, h = task // heads, task % heads
            _mean_of(weights[h, ends[r] : ends[r + 1]], values, h // group * tokens + start[r], out[r, h])


_score_kernel = Kernel(serial(_score), parallel(_score))
_mean_kernel = Kernel(serial(_mean), parallel(_mean))


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
    tokens, heads = keys.shape[1], query.shape[1]
    ends = np.zeros(len(length) + 1, np.int64)
    np.cumsum(length, out=ends[1:])
    first = np.ascontiguousarray(start)
    scores = torch.empty(heads, int(ends[-1]))
    asked = query.float().contiguous().numpy()
    _score_kernel(asked, _rows(keys), tokens, first, ends, np.float32(scale), scores.numpy())
    scores.exp_()
    out = torch.zeros(query.shape[0], heads, values.shape[2])
    _mean_kernel(scores.numpy(), _rows(values), tokens, first, ends, out.numpy())
    return out.to(query.dtype)


def _rows(pool: Tensor) -> Any:
    """``[heads * tokens, size]``: fp32, or the bits of bfloat16."""
    flat = pool.view(-1, pool.shape[2])
    return flat.view(torch.int16).numpy().view(np.uint16) if pool.dtype == torch.bfloat16 else flat.numpy()

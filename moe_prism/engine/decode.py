"""Attention of requests that decode, on a CPU: one compiled call for all of them.

Each has one query and a run of keys and values, which are read where they lie. A call of torch's attention per request
and layer costs more than the attention itself. Knows no layers and no requests, only places.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..elastic.kernels.compiled import inner, parallel, serial
from ..elastic.kernels.micro import add_row, dot
from ..elastic.kernels.threads import Kernel

Array = Any
Ints = NDArray[np.int64]


@inner
def _softmax(scores: Array) -> None:
    """In place, fp32 ``[L]``."""
    most = scores[0]
    for i in range(1, scores.shape[0]):
        most = max(most, scores[i])
    total = np.float32(0)
    for i in range(scores.shape[0]):
        scores[i] = math.exp(scores[i] - most)
        total += scores[i]
    for i in range(scores.shape[0]):
        scores[i] /= total


@serial
def _one(query: Array, keys: Array, values: Array, scale: float, scores: Array, out: Array) -> None:
    """One query head: ``[D]``, its keys ``[L, D]`` and values ``[L, V]``, ``[V]``."""
    for i in range(keys.shape[0]):
        scores[i] = scale * dot(keys[i], query)
    _softmax(scores)
    for i in range(values.shape[0]):
        add_row(out, scores[i], values[i])


def _attend(
    threads: int, query: Array, keys: Array, values: Array, start: Array, length: Array, scale: float, out: Array
) -> None:
    requests, heads = query.shape[0], keys.shape[1]
    group = query.shape[1] // heads
    longest = length.max()
    for thread in numba.prange(threads):
        scores = np.empty(longest, np.float32)
        for task in range(thread, requests * heads, threads):
            r, h = task // heads, task % heads
            k, v = keys[start[r] : start[r] + length[r], h], values[start[r] : start[r] + length[r], h]
            for q in range(h * group, (h + 1) * group):
                _one(query[r, q], k, v, scale, scores[: length[r]], out[r, q])


_kernel = Kernel(serial(_attend), parallel(_attend))


def attend(query: Tensor, keys: Tensor, values: Tensor, start: Ints, length: Ints, scale: float) -> Tensor:
    """Every request's query over its own places.

    Args:
        query: ``[R, query heads, D]``, fp32 or bfloat16, on the CPU like all others.
        keys: ``[tokens, heads, D]``, same dtype.
        values: ``[tokens, heads, V]``.
        start: int64 ``[R]``, first place of each.
        length: int64 ``[R]``, places of each, at least 1.
        scale: of the products.

    Returns:
        ``[R, query heads, V]`` in the dtype of the query; sums are fp32.
    """
    out = torch.zeros(query.shape[0], query.shape[1], values.shape[2])
    arrays = (query.float().contiguous().numpy(), _bits(keys), _bits(values))
    _kernel(*arrays, np.ascontiguousarray(start), np.ascontiguousarray(length), np.float32(scale), out.numpy())
    return out.to(query.dtype)


def _bits(pool: Tensor) -> Any:
    return pool.view(torch.int16).numpy().view(np.uint16) if pool.dtype == torch.bfloat16 else pool.numpy()

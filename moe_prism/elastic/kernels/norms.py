"""Rows divided by their root mean square, in one call. Knows arrays only."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .compiled import inner, narrow, parallel, serial, widen
from .threads import Kernel

Array = Any


@inner
def norm_row(x: Array, weight: Array, epsilon: float, out: Array) -> None:
    """One row of ``norm_rows``."""
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += widen(x[i]) * widen(x[i])
    scale = np.float32(1) / np.sqrt(total / np.float32(x.shape[0]) + np.float32(epsilon))
    for i in range(out.shape[0]):
        out[i] = narrow(widen(weight[i]) * widen(narrow(widen(x[i]) * scale, out[i])), out[i])


def _norm_rows(threads: int, x: Array, weight: Array, epsilon: float) -> Array:
    out = np.empty_like(x)
    for thread in numba.prange(threads):
        for t in range(x.shape[0] * thread // threads, x.shape[0] * (thread + 1) // threads):
            norm_row(x[t], weight, epsilon, out[t])
    return out


norm_rows = Kernel(serial(_norm_rows), parallel(_norm_rows))
"""``weight * x / sqrt(mean(x^2) + epsilon)`` of every row; the quotient is rounded before the product.

Called with: x ``[T, H]`` and weight ``[H]`` of the same dtype, fp32 or bits of bfloat16, contiguous; epsilon.
"""

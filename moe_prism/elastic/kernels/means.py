"""Vectors of the routed experts, weighted and added to the output of a layer.

One call in place of a dozen small tensor operations, which at few tokens took half as long as the layer's weights.
Knows nothing of what the vectors are.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .compiled import narrow, parallel, serial, widen
from .micro import add_row
from .threads import Kernel

Array = Any


def _add_means(
    threads: int, out: Array, vectors: Array, shares: Array, budgets: Array, index: Array, weight: Array
) -> Array:
    found = np.empty_like(out)
    for thread in numba.prange(threads):
        total = np.empty(out.shape[1], np.float32)
        for t in range(thread, out.shape[0], threads):
            for h in range(out.shape[1]):
                total[h] = widen(out[t, h])
            for p in range(shares.shape[1]):
                share = shares[budgets[t], p]
                if share != 0:
                    for s in range(index.shape[1]):
                        add_row(total, share * weight[t, s], vectors[p, index[t, s]])
            for h in range(out.shape[1]):
                found[t, h] = narrow(total[h], out[t, h])
    return found


add_means = Kernel(serial(_add_means), parallel(_add_means))
"""``out[t] + sum over p and s of shares[budgets[t], p] * weight[t, s] * vectors[p, index[t, s]]``, rounded once.

Called with: out ``[T, H]`` (uint16 bits of bfloat16, or fp32); vectors fp32 ``[P, E, H]``; shares fp32 ``[F + 1, P]``;
budgets int64 ``[T]``; index int64 ``[T, k]``; weight fp32 ``[T, k]``. Returns ``[T, H]`` in the dtype of out.
"""

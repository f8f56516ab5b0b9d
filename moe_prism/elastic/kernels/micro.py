"""Innermost loops over the hidden size.

Rows are sliced before a loop, so that an index cannot be negative and the loop vectorises. Two rows times four
tokens fill the registers of AVX2; four rows for one token are in ``streams``. Knows nothing of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .compiled import inner, widen

Array = Any


@inner
def dot(row: Array, v: Array) -> Any:
    """One row times one token."""
    s = np.float32(0)
    for h in range(v.shape[0]):
        s += widen(row[h]) * v[h]
    return s


@inner
def dot_2_rows_2_tokens(a: Array, b: Array, u: Array, v: Array) -> Any:
    """Two rows times two tokens: (a u, b u, a v, b v)."""
    au = bu = av = bv = np.float32(0)
    for h in range(u.shape[0]):
        wa, wb = widen(a[h]), widen(b[h])
        au += wa * u[h]
        bu += wb * u[h]
        av += wa * v[h]
        bv += wb * v[h]
    return au, bu, av, bv


@inner
def dot_2_rows_4_tokens(a: Array, b: Array, x0: Array, x1: Array, x2: Array, x3: Array) -> Any:
    """Two rows times four tokens; the sums of ``a`` come first."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    for h in range(x0.shape[0]):
        wa, wb = widen(a[h]), widen(b[h])
        a0 += wa * x0[h]
        a1 += wa * x1[h]
        a2 += wa * x2[h]
        a3 += wa * x3[h]
        b0 += wb * x0[h]
        b1 += wb * x1[h]
        b2 += wb * x2[h]
        b3 += wb * x3[h]
    return a0, a1, a2, a3, b0, b1, b2, b3


@inner
def add_4_rows_2_tokens(y: Array, z: Array, w: Array, v: Array, a: Array, b: Array, c: Array, d: Array) -> None:
    """Four rows added to two tokens."""
    w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
    v0, v1, v2, v3 = v[0], v[1], v[2], v[3]
    for j in range(y.shape[0]):
        ra, rb, rc, rd = widen(a[j]), widen(b[j]), widen(c[j]), widen(d[j])
        y[j] += w0 * ra + w1 * rb + w2 * rc + w3 * rd
        z[j] += v0 * ra + v1 * rb + v2 * rc + v3 * rd


@inner
def add_row(y: Array, w: Any, a: Array) -> None:
    """``y += w * a``."""
    for j in range(y.shape[0]):
        y[j] += w * widen(a[j])

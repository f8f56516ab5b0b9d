"""What lies between two layers' experts, in two compiled calls: one up to attention, one after it.

bfloat16 only, with linear layers in panels; rounded where transformers rounds, so that both give the same numbers.
Knows arrays only. At few tokens a layer's experts and linear layers stream through the caches, and every small tensor
operation in between finds them cold: forty of them took as long as the attention's linear layers.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from ..elastic.kernels.compiled import inner, narrow, parallel, serial, widen
from ..elastic.kernels.linear_panels import multiply_blocks
from ..elastic.kernels.norms import norm_row
from ..elastic.kernels.threads import Kernel
from .decode import attend_some

Array = Any


@inner
def _add(x: Array, y: Array, out: Array) -> None:
    for i in range(out.shape[0]):
        out[i] = narrow(widen(x[i]) + widen(y[i]), out[i])


@inner
def _rotate(x: Array, cos: Array, sin: Array, out: Array) -> None:
    """A head's row turned by the angles of its position, every product and sum rounded."""
    half = out.shape[0] // 2
    low, high, out_low, out_high = x[:half], x[half:], out[:half], out[half:]
    for i in range(half):
        kept = narrow(widen(low[i]) * widen(cos[i]), out[i])
        moved = narrow(-widen(high[i]) * widen(sin[i]), out[i])
        out_low[i] = narrow(widen(kept) + widen(moved), out[i])
    cos, sin = cos[half:], sin[half:]
    for i in range(half):
        kept = narrow(widen(high[i]) * widen(cos[i]), out[i])
        moved = narrow(widen(low[i]) * widen(sin[i]), out[i])
        out_high[i] = narrow(widen(kept) + widen(moved), out[i])


@serial
def _normed(row: Array, weight: Array, epsilon: float) -> Array:
    """The row divided by the root mean square of every run as long as ``weight``; itself if that is empty."""
    size = weight.shape[0]
    if size == 0:
        return row
    out = np.empty_like(row)
    for at in range(0, row.shape[0], size):
        norm_row(row[at : at + size], weight, epsilon, out[at : at + size])
    return out


@serial
def _share(blocks: int, begin: int, end: int, offset: int) -> Any:
    """Of blocks numbered on from ``offset``, those in ``begin .. end``, as their own numbers."""
    return max(begin - offset, 0), min(max(end - offset, 0), blocks)


def _before_attention(
    threads: int,
    residual: Array,
    delta: Array,
    norm: Array,
    epsilon: float,
    wq: Array,
    bq: Array,
    wk: Array,
    bk: Array,
    wv: Array,
    bv: Array,
    q_norm: Array,
    q_epsilon: float,
    k_norm: Array,
    k_epsilon: float,
    cos: Array,
    sin: Array,
    position: Array,
    keys: Array,
    values: Array,
    places: Array,
    start: Array,
    length: Array,
    scale: float,
) -> Any:
    tokens, pool = residual.shape[0], keys.shape[1]
    size, value_size = keys.shape[2], values.shape[2]
    hidden, x = np.empty_like(residual), np.empty_like(residual)
    for thread in numba.prange(threads):
        for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
            _add(residual[t], delta[t], hidden[t])
            norm_row(hidden[t], norm, epsilon, x[t])
    q_blocks, k_blocks, v_blocks = wq.shape[0], wk.shape[0], wv.shape[0]
    blocks = q_blocks + k_blocks + v_blocks
    q = np.empty((tokens, bq.shape[0]), np.uint16)
    k = np.empty((tokens, bk.shape[0]), np.uint16)
    v = np.empty((tokens, bv.shape[0]), np.uint16)
    for thread in numba.prange(threads):
        begin, end = blocks * thread // threads, blocks * (thread + 1) // threads
        first, last = _share(q_blocks, begin, end, 0)
        multiply_blocks(wq, x, bq, first, last, q)
        first, last = _share(k_blocks, begin, end, q_blocks)
        multiply_blocks(wk, x, bk, first, last, k)
        first, last = _share(v_blocks, begin, end, q_blocks + k_blocks)
        multiply_blocks(wv, x, bv, first, last, v)
    query = np.empty_like(q)
    for thread in numba.prange(threads):
        for t in range(tokens * thread // threads, tokens * (thread + 1) // threads):
            turn, tilt = cos[position[t]], sin[position[t]]
            row = _normed(q[t], q_norm, q_epsilon)
            for at in range(0, row.shape[0], size):
                _rotate(row[at : at + size], turn, tilt, query[t, at : at + size])
            row = _normed(k[t], k_norm, k_epsilon)
            for head in range(keys.shape[0]):
                _rotate(row[head * size : (head + 1) * size], turn, tilt, keys[head, places[t]])
                values[head, places[t]] = v[t, head * value_size : (head + 1) * value_size]
    attended = np.empty((tokens, q.shape[1] // size * value_size), np.uint16)
    flat_keys, flat_values = keys.reshape(-1, size), values.reshape(-1, value_size)
    for thread in numba.prange(threads):
        attend_some(query, flat_keys, flat_values, pool, start, length, scale, thread, threads, attended)
    return hidden, query, attended


before_attention = Kernel(serial(_before_attention), parallel(_before_attention))
"""Residual sum, norm, queries, keys and values, their norms and rotation, and attention of the first R tokens.

Called with: residual and what is added to it ``[T, H]``; weight and epsilon of the norm; weight in panels and bias (see
``linear_panels``) of queries, keys and values; weights and epsilons of the norms of queries and keys, as long as a
head, as all heads, or empty; cos, sin ``[positions, D]`` and int64 ``[T]`` of the tokens' positions; keys
``[heads, places, D]`` and values ``[heads, places, V]``, which are written to; places int64 ``[T]`` of the tokens;
start, length int64 ``[R]`` of what each of the first R attends to; the scale of its products. Numbers are bits of
bfloat16 where nothing else is said. Returns the sum, the queries ``[T, query heads * D]``, and
``[T, query heads * V]``, of which the first R rows are written.
"""


@serial
def _choose(logits: Array, experts: int, renormalise: bool, rounded: bool, index: Array, weight: Array) -> None:
    """The best experts of a token, of equal ones the first, and their shares of a softmax over all."""
    most, total = logits[0], np.float32(0)
    for e in range(experts):
        most = max(most, logits[e])
    for e in range(experts):
        total += np.exp(logits[e] - most)
    taken = np.zeros(experts, np.bool_)
    chosen = np.float32(0)
    for slot in range(index.shape[0]):
        best = -1
        for e in range(experts):
            if not taken[e] and (best < 0 or logits[e] > logits[best]):
                best = e
        taken[best] = True
        index[slot], weight[slot] = best, np.exp(logits[best] - most) / total
        chosen += weight[slot]
    for slot in range(index.shape[0]):
        share = weight[slot] / chosen if renormalise else weight[slot]
        weight[slot] = widen(narrow(share, np.uint16(0))) if rounded else share


@serial
def _route_rows(
    x: Array,
    router: Array,
    bias: Array,
    experts: int,
    renormalise: bool,
    rounded: bool,
    index: Array,
    weight: Array,
) -> None:
    bits, logits = np.empty((x.shape[0], bias.shape[0]), np.uint16), np.empty(experts, np.float32)
    multiply_blocks(router, x, bias, 0, router.shape[0], bits)
    for t in range(x.shape[0]):
        for e in range(experts):
            logits[e] = widen(bits[t, e])
        _choose(logits, experts, renormalise, rounded, index[t], weight[t])


@serial
def route(x: Array, router: Array, bias: Array, experts: int, slots: int, renormalise: bool, rounded: bool) -> Any:
    """Experts and shares of ``x``, as ``after_attention`` finds them."""
    index, weight = np.empty((x.shape[0], slots), np.int64), np.empty((x.shape[0], slots), np.float32)
    _route_rows(x, router, bias, experts, renormalise, rounded, index, weight)
    return index, weight


def _after_attention(
    threads: int,
    residual: Array,
    attended: Array,
    wo: Array,
    bo: Array,
    norm: Array,
    epsilon: float,
    router: Array,
    bias: Array,
    experts: int,
    slots: int,
    renormalise: bool,
    rounded: bool,
) -> Any:
    tokens, blocks = residual.shape[0], wo.shape[0]
    out, hidden, x = np.empty_like(residual), np.empty_like(residual), np.empty_like(residual)
    index, weight = np.empty((tokens, slots), np.int64), np.empty((tokens, slots), np.float32)
    for thread in numba.prange(threads):
        multiply_blocks(wo, attended, bo, blocks * thread // threads, blocks * (thread + 1) // threads, out)
    for thread in numba.prange(threads):
        first, last = tokens * thread // threads, tokens * (thread + 1) // threads
        for t in range(first, last):
            _add(residual[t], out[t], hidden[t])
            norm_row(hidden[t], norm, epsilon, x[t])
        if slots > 0:
            mine = slice(first, last)
            _route_rows(x[mine], router, bias, experts, renormalise, rounded, index[mine], weight[mine])
    return hidden, x, index, weight


after_attention = Kernel(serial(_after_attention), parallel(_after_attention))
"""The output layer of attention, residual sum and norm, and the router of what follows.

Called with the sum so far and what attention gave, both bits of bfloat16; weight and bias of the layer; weight and
epsilon of the norm; weight and bias of the router in panels, how many of its outputs are experts, and how many of them
a token gets (0: there is no such router); whether the shares of these add up to one; and whether shares are rounded to
bfloat16. Returns the new sum, its norm, and experts int64 ``[T, k]`` with their shares fp32 ``[T, k]``.
"""


def _add_and_norm(threads: int, residual: Array, delta: Array, norm: Array, epsilon: float) -> Array:
    x = np.empty_like(residual)
    hidden = np.empty_like(residual)
    for thread in numba.prange(threads):
        for t in range(residual.shape[0] * thread // threads, residual.shape[0] * (thread + 1) // threads):
            _add(residual[t], delta[t], hidden[t])
            norm_row(hidden[t], norm, epsilon, x[t])
    return x


add_and_norm = Kernel(serial(_add_and_norm), parallel(_add_and_norm))
"""Residual sum and norm: called with both ``[T, H]``, bits of bfloat16, weight and epsilon of the norm."""

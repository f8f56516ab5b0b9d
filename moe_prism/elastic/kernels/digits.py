"""A whole layer of SiLU-gated neurons read from two planes of 4-bit digits: skipped, at 4 bits, or raised to 8.

For few tokens. Only the rows that a token needs are read: upper digits of the gates looked at, upper digits of up and
down of the neurons that run, lower digits of those that are raised, whose sums are added to what the upper ones gave.
Knows the planes of ``experts.shadow`` and the usual activation, and no biases.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .compiled import inner, parallel, serial, widen
from .gated import total, widened
from .neurons import keep_best
from .threads import Kernel

Array = Any


@inner
def _dot(digits: Array, scale: Array, v: Array, sums: Array) -> Any:
    """``sum of scale * (digit - 8) * v``; ``sums`` are those of v over groups of 32."""
    result = np.float32(0)
    for g in range(scale.shape[0]):
        packed, first, second = digits[16 * g : 16 * g + 16], v[32 * g : 32 * g + 16], v[32 * g + 16 : 32 * g + 32]
        s = np.float32(0)
        for j in range(16):
            s += np.float32(packed[j] & 15) * first[j] + np.float32(packed[j] >> 4) * second[j]
        result += widen(scale[g]) * (s - np.float32(8) * sums[g])
    return result


@inner
def _add(y: Array, w: Any, digits: Array, scale: Array) -> None:
    """``y += w * scale * (digit - 8)``."""
    for g in range(scale.shape[0]):
        packed, first, second = digits[16 * g : 16 * g + 16], y[32 * g : 32 * g + 16], y[32 * g + 16 : 32 * g + 32]
        factor = w * widen(scale[g])
        for j in range(16):
            first[j] += factor * (np.float32(packed[j] & 15) - np.float32(8))
            second[j] += factor * (np.float32(packed[j] >> 4) - np.float32(8))


@inner
def _silu(gate: Any) -> Any:
    return gate / (np.float32(1) + np.exp(-gate))


@serial
def _raised(score: Array, token: Array, count: Array) -> Any:
    """The ``count[t]`` best of every token, bool; tokens lie together, and equals are taken in order."""
    out = np.zeros(score.shape[0], np.bool_)
    begin = 0
    while begin < score.shape[0]:
        t, end = token[begin], begin
        while end < score.shape[0] and token[end] == t:
            end += 1
        best = min(count[t], end - begin)
        order = np.argsort(-score[begin:end], kind="mergesort")
        for i in order[:best]:
            out[begin + i] = True
        begin = end
    return out


def _digit_neurons(
    threads: int,
    gate_up: Any,
    down: Any,
    x: Array,
    token: Array,
    sub_expert: Array,
    weight: Array,
    scale: Array,
    norms: Array,
    count: Array,
    raise_count: Array,
    neurons: int,
    n: int,
) -> Array:
    upper, lower, steps = gate_up
    down_upper, down_lower, down_steps = down
    pairs, size = token.shape[0], neurons // n
    tokens = widened(x)
    sums = np.zeros((x.shape[0], x.shape[1] // 32), np.float32)
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            sums[t, h // 32] += tokens[t, h]
    gate = np.empty((pairs, size), np.float32)
    score = np.empty((pairs, size), np.float32)
    for thread in numba.prange(threads):
        for i in range(thread * pairs * size // threads, (thread + 1) * pairs * size // threads):
            s, c = i // size, i % size
            row = sub_expert[s] // n * 2 * neurons + sub_expert[s] % n * size + c
            value = np.float32(16) * _dot(upper[row], steps[row], tokens[token[s]], sums[token[s]])
            gate[s, c] = value
            much = abs(weight[s] * _silu(value)) * scale[sub_expert[s], c]
            score[s, c] = np.float32(np.inf) if np.isnan(much) else much
    pair, neuron = keep_best(score, token, count, 0.0)
    kept = pair.shape[0]
    owner, down_row = token[pair], sub_expert[pair] * size + neuron
    up_row = down_row + (sub_expert[pair] // n + 1) * neurons  # experts before it: C rows of gate and C of up each
    up = np.empty(kept, np.float32)
    second = np.empty(kept, np.float32)
    for thread in numba.prange(threads):
        for i in range(thread * kept // threads, (thread + 1) * kept // threads):
            up[i] = np.float32(16) * _dot(upper[up_row[i]], steps[up_row[i]], tokens[owner[i]], sums[owner[i]])
            much = abs(weight[pair[i]] * _silu(gate[pair[i], neuron[i]]) * up[i]) * norms[down_row[i]]
            second[i] = np.float32(np.inf) if np.isnan(much) else much
    high = _raised(second, owner, raise_count)
    out = np.zeros((threads, x.shape[0], x.shape[1]), np.float32)
    for thread in numba.prange(threads):
        for i in range(thread * kept // threads, (thread + 1) * kept // threads):
            v, s, y = tokens[owner[i]], sums[owner[i]], out[thread, owner[i]]
            g, u, row = gate[pair[i], neuron[i]], up[i], down_row[i]
            if high[i]:
                gate_row = up_row[i] - neurons
                g += _dot(lower[gate_row], steps[gate_row], v, s)
                u += _dot(lower[up_row[i]], steps[up_row[i]], v, s)
            active = weight[pair[i]] * _silu(g) * u
            _add(y, np.float32(16) * active, down_upper[row], down_steps[row])
            if high[i]:
                _add(y, active, down_lower[row], down_steps[row])
    return total(out, x)


digit_neurons = Kernel(serial(_digit_neurons), parallel(_digit_neurons))
"""The neurons that a rung runs, at its bits.

Called with: gate_up and down, each (upper uint8 ``[R, H / 2]``, lower, scale ``[R, H / 32]`` as the bits of bfloat16);
x ``[T, H]``; token, sub_expert and weight ``[S]`` of the pairs looked at; scale fp32 ``[E * n, C / n]``; norms fp32
``[E * C]``; count and raise_count int64 ``[T]``; C; n. Returns ``[T, H]`` in the dtype of x.
"""

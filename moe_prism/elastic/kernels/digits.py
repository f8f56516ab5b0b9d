"""A whole layer of SiLU-gated neurons read from two planes of 4-bit digits: skipped, at 4 bits, or raised to 8.

For few tokens. Only the rows that a token needs are read: upper digits of the gates looked at, upper digits of up and
down of the neurons that run, lower digits of those that are raised, whose sums are added to what the upper ones gave.
Knows the planes of ``experts.shadow`` and the usual activation, and no biases.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .compiled import parallel, serial
from .digit_rows import add_digits, dot_digits
from .gated import total
from .neurons import keep_best
from .products import widened
from .silu import silu
from .threads import Kernel

Array = Any


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
        if best:
            mine = score[begin:end]
            least = np.partition(mine, end - begin - best)[end - begin - best]
            equals = best - np.sum(mine > least)
            for i in range(begin, end):
                out[i] = score[i] > least
                if score[i] == least and equals:
                    out[i] = True
                    equals -= 1
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
    gate = np.empty((pairs, size), np.float32)
    score = np.empty((pairs, size), np.float32)
    for thread in numba.prange(threads):
        for i in range(thread * pairs * size // threads, (thread + 1) * pairs * size // threads):
            s, c = i // size, i % size
            row = sub_expert[s] // n * 2 * neurons + sub_expert[s] % n * size + c
            value = np.float32(16) * dot_digits(upper[row], steps[row], tokens[token[s]])
            gate[s, c] = value
            much = abs(weight[s] * silu(value)) * scale[sub_expert[s], c]
            score[s, c] = np.float32(np.inf) if np.isnan(much) else much
    pair, neuron = keep_best(score, token, count, 0.0)
    kept = pair.shape[0]
    owner, down_row = token[pair], sub_expert[pair] * size + neuron
    up_row = down_row + (sub_expert[pair] // n + 1) * neurons  # experts before it: C rows of gate and C of up each
    up = np.empty(kept, np.float32)
    second = np.empty(kept, np.float32)
    for thread in numba.prange(threads):
        for i in range(thread * kept // threads, (thread + 1) * kept // threads):
            up[i] = np.float32(16) * dot_digits(upper[up_row[i]], steps[up_row[i]], tokens[owner[i]])
            much = abs(weight[pair[i]] * silu(gate[pair[i], neuron[i]]) * up[i]) * norms[down_row[i]]
            second[i] = np.float32(np.inf) if np.isnan(much) else much
    high = _raised(second, owner, raise_count)
    out = np.zeros((threads, x.shape[0], x.shape[1]), np.float32)
    for thread in numba.prange(threads):
        for i in range(thread * kept // threads, (thread + 1) * kept // threads):
            v, y = tokens[owner[i]], out[thread, owner[i]]
            g, u, row = gate[pair[i], neuron[i]], up[i], down_row[i]
            if high[i]:
                gate_row = up_row[i] - neurons
                g += dot_digits(lower[gate_row], steps[gate_row], v)
                u += dot_digits(lower[up_row[i]], steps[up_row[i]], v)
            active = weight[pair[i]] * silu(g) * u
            add_digits(y, np.float32(16) * active, down_upper[row], down_steps[row])
            if high[i]:
                add_digits(y, active, down_lower[row], down_steps[row])
    return total(out, x)


digit_neurons = Kernel(serial(_digit_neurons), parallel(_digit_neurons))
"""The neurons that a rung runs, at its bits.

Called with: gate_up and down, each (upper uint8 ``[R, H / 2]``, lower, scale ``[R, H / 32]`` as the bits of bfloat16);
x ``[T, H]``; token, sub_expert and weight ``[S]`` of the pairs looked at; scale fp32 ``[E * n, C / n]``; norms fp32
``[E * C]``; count and raise_count int64 ``[T]``; C; n. Returns ``[T, H]`` in the dtype of x.
"""

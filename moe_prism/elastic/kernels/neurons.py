"""A whole layer of SiLU-gated sub-experts that runs only the neurons whose gate makes them matter.

All gate rows are read; then up and down rows of the kept neurons only, row by row. For few tokens: a row that
two tokens keep is read twice. Knows the usual activation only, and no biases.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .compiled import RUN, inner, parallel, serial, share_tasks
from .gated import run_starts, total
from .micro import add_row, dot
from .products import multiply_run, widened
from .streams import add_4_rows, dot_4_rows
from .threads import Kernel

Array = Any


@inner
def _score(gate: Array, score: Array, weight: Any, scale: Array) -> None:
    """Replace gate by ``weight * silu(gate)``; ``score = |that| * scale``, infinite for NaN, which is kept."""
    for c in range(gate.shape[0]):
        active = weight * (gate[c] / (np.float32(1) + np.exp(-gate[c])))
        gate[c] = active
        value = abs(active) * scale[c]
        score[c] = np.float32(np.inf) if np.isnan(value) else value


_BITS = 12  # of a score: sign, exponent and three bits of mantissa


@inner
def _bucket(bits: Any) -> Any:
    """The leading bits of an fp32 number, given as uint32, such that greater numbers have greater ones."""
    flipped = bits ^ (np.uint32(0xFFFFFFFF) if bits >> np.uint32(31) else np.uint32(0x80000000))
    return flipped >> np.uint32(32 - _BITS)


@serial
def _least_kept(score: Array, mine: Array, count: int) -> Any:
    """The ``count``-th best score of the rows ``mine``, and how many of those equal to it belong to the best.

    Counts scores by their leading bits first: putting all of them in order took a twentieth of the layer's time.
    """
    found = np.zeros(1 << _BITS, np.int64)
    for s in mine:
        bits = score[s].view(np.uint32)
        for c in range(bits.shape[0]):
            found[_bucket(bits[c])] += 1
    bucket, above = (1 << _BITS) - 1, 0
    while above + found[bucket] < count:
        above += found[bucket]
        bucket -= 1
    values, filled = np.empty(found[bucket], np.float32), 0
    for s in mine:
        bits = score[s].view(np.uint32)
        for c in range(bits.shape[0]):
            if _bucket(bits[c]) == bucket:
                values[filled] = score[s, c]
                filled += 1
    at = filled - (count - above)
    least = np.partition(values, at)[at]
    greater = 0
    for s in mine:  # not ``above`` and those of the bucket: a zero has two signs, which lie in two buckets
        for c in range(score.shape[1]):
            greater += score[s, c] > least
    return least, count - greater


@serial
def keep_best(score: Array, token: Array, count: Array, threshold: float) -> Any:
    """(pair, neuron of its sub-expert) of the kept neurons, those of a token together, in row order.

    Every token's ``count[t]`` best, the first ones among equals; with a count of 0, those above the threshold.
    """
    pairs, size = score.shape
    by_token = np.argsort(token, kind="mergesort")
    begin = 0
    pair = np.empty(pairs * size, np.int64)
    neuron = np.empty(pairs * size, np.int64)
    kept = 0
    while begin < pairs:
        t, end = token[by_token[begin]], begin + 1
        while end < pairs and token[by_token[end]] == t:
            end += 1
        mine = by_token[begin:end]
        begin = end
        total = mine.shape[0] * size
        least, equals = np.float32(threshold), 0
        if count[t] >= total:
            least = -np.float32(np.inf)  # below every score
        elif count[t]:
            least, equals = _least_kept(score, mine, count[t])
        for s in mine:
            for c in range(size):
                equal = equals > 0 and score[s, c] == least
                equals -= equal
                pair[kept], neuron[kept] = s, c  # overwritten by the next one, unless it is kept
                kept += equal or score[s, c] > least
    return pair[:kept], neuron[:kept]


@serial
def _keep_blocks(score: Array, token: Array, count: Array, threshold: float, block: int) -> Any:
    """``keep_best`` of runs of ``block`` neurons by the sums of their scores; ``count`` is of blocks."""
    if block == 1:
        return keep_best(score, token, count, threshold)
    pairs, size = score.shape
    sums = np.zeros((pairs, size // block), np.float32)
    for s in range(pairs):
        for c in range(size):
            sums[s, c // block] += score[s, c]
    pair, which = keep_best(sums, token, count, threshold)
    inside = np.arange(pair.shape[0] * block) % block
    return np.repeat(pair, block), np.repeat(which * block, block) + inside


@serial
def _run_neurons(
    gate_up: Array, down: Array, x: Array, active: Array, up_row: Array, down_row: Array, token: Array, out: Array
) -> None:
    """``out[token] += active * (up row . x[token]) * down row``, neuron by neuron."""
    i, stop = 0, token.shape[0]
    while i < stop:
        v, y = x[token[i]], out[token[i]]
        if i + 4 <= stop and token[i] == token[i + 3]:
            a, u, d = active[i : i + 4], up_row[i : i + 4], down_row[i : i + 4]
            j = i + 4 if i + 8 <= stop else i
            p, q = up_row[j : j + 4], down_row[j : j + 4]
            h0, h1, h2, h3 = dot_4_rows(gate_up, (u[0], u[1], u[2], u[3]), (p[0], p[1], p[2], p[3]), v)
            weights = (a[0] * h0, a[1] * h1, a[2] * h2, a[3] * h3)
            add_4_rows(y, weights, down, (d[0], d[1], d[2], d[3]), (q[0], q[1], q[2], q[3]))
            i += 4
        else:
            add_row(y, active[i] * dot(gate_up[up_row[i]], v), down[down_row[i]])
            i += 1


def _gated_neurons(
    threads: int,
    gate_up: Array,
    down: Array,
    x: Array,
    token: Array,
    sub_expert: Array,
    weight: Array,
    scale: Array,
    count: Array,
    threshold: float,
    block: int,
    neurons: int,
    n: int,
) -> Array:
    pairs, size = token.shape[0], neurons // n
    tokens = widened(x)
    starts = run_starts(sub_expert)
    gate = np.empty((pairs, size), np.float32)
    score = np.empty((pairs, size), np.float32)
    runs = (size + RUN - 1) // RUN
    bounds = share_tasks(starts, runs, 1, threads)
    for thread in numba.prange(threads):
        for task in range(bounds[thread], bounds[thread + 1]):
            group, begin = task // runs, task % runs * RUN
            end = min(begin + RUN, size)
            s0, s1 = starts[group], starts[group + 1]
            which = sub_expert[s0]
            row = which // n * 2 * neurons + which % n * size + begin
            multiply_run(gate_up, row, end - begin, tokens, token, s0, s1, gate, begin)
            for s in range(s0, s1):
                _score(gate[s, begin:end], score[s, begin:end], weight[s], scale[which, begin:end])
    pair, neuron = _keep_blocks(score, token, count, threshold, block)
    down_row = sub_expert[pair] * size + neuron
    up_row = down_row + (sub_expert[pair] // n + 1) * neurons  # experts before it: C rows of gate and C of up each
    owner = token[pair]
    active = np.empty(pair.shape[0], np.float32)
    for i in range(pair.shape[0]):
        active[i] = gate[pair[i], neuron[i]]
    sums = np.zeros((threads, x.shape[0], x.shape[1]), np.float32)
    for thread in numba.prange(threads):
        a, b = thread * pair.shape[0] // threads, (thread + 1) * pair.shape[0] // threads
        _run_neurons(gate_up, down, tokens, active[a:b], up_row[a:b], down_row[a:b], owner[a:b], sums[thread])
    return total(sums, x)


gated_neurons = Kernel(serial(_gated_neurons), parallel(_gated_neurons))
"""The kept neurons of selected sub-experts.

Called as ``gated_experts``, with ``scale`` fp32 ``[E * n, C / n]`` in place of ``known``, then count int64 ``[T]``,
threshold and block: a neuron's score is ``weight * |silu(gate)| * scale``, a block's the sum of its ``block`` neurons';
each token runs its ``count`` best blocks, or with a count of 0 those above the threshold.
"""

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
from .silu import silu
from .streams import add_4_rows, dot_4_rows
from .threads import Kernel

Array = Any


@inner
def score_gates(
    gate: Array, score: Array, s0: int, s1: int, begin: int, end: int, weight: Array, scale: Array, which: int
) -> None:
    """Gates become ``weight * silu(gate)``; scores ``|that| * scale``, infinite for NaN, which is kept.

    Of the pairs ``s0 .. s1``, neurons ``begin .. end`` of the sub-expert ``which``.
    """
    for s in range(s0, s1):
        for c in range(begin, end):
            active = weight[s] * silu(gate[s, c])
            gate[s, c] = active
            value = abs(active) * scale[which, c]
            score[s, c] = np.float32(np.inf) if np.isnan(value) else value


@inner
def _places(score: Array, bits: Array, mine: Array) -> Array:
    """A number for every score of the rows ``mine``, which is greater for greater ones; a zero has one, not two."""
    size = score.shape[1]
    places = np.empty(mine.shape[0] * size, np.int32)
    for i in range(mine.shape[0]):
        for c in range(size):
            at = bits[mine[i], c]
            zero = score[mine[i], c] == 0
            places[i * size + c] = np.int32(0) if zero else at ^ ((at >> np.int32(31)) & np.int32(0x7FFFFFFF))
    return places


@inner
def _at_least(places: Array, least: Any) -> Any:
    found = 0
    for i in range(places.shape[0]):
        found += places[i] >= least
    return found


@serial
def _least_kept(score: Array, mine: Array, count: int) -> Any:
    """The ``count``-th best score of the rows ``mine``, or one that as many reach; see ``bound``.

    Found by halving the range of fp32 numbers: counting what lies above takes one vector instruction for many scores,
    and putting them in order took a twentieth of the layer's time.
    """
    places = _places(score, score.view(np.int32), mine)
    low, bit, reached = -(1 << 31), 31, places.shape[0]  # ``reached`` scores reach ``low``, at least ``count``
    while reached > count and bit >= 0:
        middle = low + (1 << bit)
        above = _at_least(places, np.int32(middle))
        if above >= count:
            low, reached = middle, above
        bit -= 1
    greater = _at_least(places, np.int32(low + 1))
    least = np.empty(1, np.int32)
    least[0] = np.int32(low) ^ ((np.int32(low) >> np.int32(31)) & np.int32(0x7FFFFFFF))
    return least.view(np.float32)[0], count - greater, reached - greater


@serial
def bound(score: Array, mine: Array, count: int, threshold: float) -> Any:
    """What a token keeps whose pairs are ``mine``: its ``count`` best, or with a count of 0 those above the threshold.

    Returns:
        A score of which it keeps all that are greater, how many of those equal to it, the first ones, and of how many;
        the last is -1 where nobody counted.
    """
    total = mine.shape[0] * score.shape[1]
    if count >= total:
        return -np.float32(np.inf), total, total  # no score is below, and those that are equal are kept too
    if count:
        return _least_kept(score, mine, count)
    return np.float32(threshold), 0, -1


@serial
def by_value(values: Array, end: int) -> Any:
    """Places of whole numbers below ``end`` in the order of the numbers, equals in theirs; where each number's begin.

    Returns:
        int64 ``[S]`` and ``[end + 1]``.
    """
    first = np.zeros(end + 1, np.int64)
    for value in values:
        first[value + 1] += 1
    for value in range(end):
        first[value + 1] += first[value]
    order, free = np.empty(values.shape[0], np.int64), first.copy()
    for s in range(values.shape[0]):
        order[free[values[s]]] = s
        free[values[s]] += 1
    return order, first


@serial
def keep_best(score: Array, token: Array, count: Array, threshold: float) -> Any:
    """(pair, neuron of its sub-expert) of the neurons kept as in ``bound``, those of a token together, in row order."""
    pairs, size = score.shape
    order, first = by_value(token, count.shape[0])
    pair = np.empty(pairs * size, np.int64)
    neuron = np.empty(pairs * size, np.int64)
    kept = 0
    for t in range(count.shape[0]):
        mine = order[first[t] : first[t + 1]]
        least, equals, _ = bound(score, mine, count[t], threshold)
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
            score_gates(gate, score, s0, s1, begin, end, weight, scale, which)
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

"""A whole layer of SiLU-gated sub-experts that runs only the neurons whose gate makes them matter.

All gate rows are read; then up and down rows of the kept neurons only, row by row. For few tokens: a row that
two tokens keep is read twice. Knows the usual activation only, and no biases.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .compiled import RUN, inner, parallel, serial, share_tasks
from .gated import run_starts, widened
from .micro import add_8_rows, add_row, dot, dot_4_rows
from .products import multiply_run
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


@serial
def _keep(score: Array, token: Array, count: Array, threshold: float) -> Any:
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
            least = np.float32(-1)  # below every score
        elif count[t]:
            values = score[mine].copy().reshape(-1)
            least = np.partition(values, total - count[t])[total - count[t]]
            equals = count[t] - np.sum(values > least)
        for s in mine:
            for c in range(size):
                take = score[s, c] > least
                if not take and equals and score[s, c] == least:
                    take = True
                    equals -= 1
                if take:
                    pair[kept], neuron[kept] = s, c
                    kept += 1
    return pair[:kept], neuron[:kept]


@serial
def _run_neurons(
    gate_up: Array, down: Array, x: Array, active: Array, up_row: Array, down_row: Array, token: Array, out: Array
) -> None:
    """``out[token] += active * (up row . x[token]) * down row``, neuron by neuron."""
    hidden = np.empty(8, np.float32)
    i, stop = 0, token.shape[0]
    while i < stop:
        v, y = x[token[i]], out[token[i]]
        if i + 8 <= stop and token[i] == token[i + 7]:
            u, d = up_row[i : i + 8], down_row[i : i + 8]
            hidden[0], hidden[1], hidden[2], hidden[3] = dot_4_rows(gate_up, u[0], u[1], u[2], u[3], v)
            hidden[4], hidden[5], hidden[6], hidden[7] = dot_4_rows(gate_up, u[4], u[5], u[6], u[7], v)
            for j in range(8):
                hidden[j] *= active[i + j]
            add_8_rows(
                y, hidden,
                down[d[0]], down[d[1]], down[d[2]], down[d[3]], down[d[4]], down[d[5]], down[d[6]], down[d[7]],
            )  # fmt: skip
            i += 8
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
    neurons: int,
    n: int,
    out: Array,
) -> None:
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
    pair, neuron = _keep(score, token, count, threshold)
    down_row = sub_expert[pair] * size + neuron
    up_row = down_row + (sub_expert[pair] // n + 1) * neurons  # experts before it: C rows of gate and C of up each
    owner = token[pair]
    active = np.empty(pair.shape[0], np.float32)
    for i in range(pair.shape[0]):
        active[i] = gate[pair[i], neuron[i]]
    sums = np.zeros((threads, out.shape[0], out.shape[1]), np.float32)
    for thread in numba.prange(threads):
        a, b = thread * pair.shape[0] // threads, (thread + 1) * pair.shape[0] // threads
        _run_neurons(gate_up, down, tokens, active[a:b], up_row[a:b], down_row[a:b], owner[a:b], sums[thread])
    for thread in range(threads):
        out += sums[thread]


gated_neurons = Kernel(serial(_gated_neurons), parallel(_gated_neurons))
"""The kept neurons of selected sub-experts.

Called as ``gated_experts``, with ``scale`` fp32 ``[E * n, C / n]`` in place of ``known``, then count int64 ``[T]`` and
threshold: a neuron's score is ``weight * |silu(gate)| * scale``; each token runs its ``count`` best, or with a count of
0 those above the threshold.
"""

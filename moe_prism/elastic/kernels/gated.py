"""A whole layer of SiLU-gated sub-experts in one call.

Streaming the weights empties the caches, so every small operation between two kernels costs several times
what it costs alone: at one token and a quarter of the budget they were a third of the layer's time. Knows
the usual activation only, and no biases.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .compiled import RUN, inner, narrow, parallel, serial, share_tasks
from .products import multiply_run, widened
from .silu import silu
from .sums import add_run
from .threads import Kernel

Array = Any


@inner
def activate(gate_up: Array, weight: Array, known: Array, begin: int, end: int, s0: int, s1: int) -> None:
    """Replace gate by ``weight * silu(gate) * up`` in columns ``begin .. end`` of the pairs ``s0 .. s1``."""
    size, r = gate_up.shape[1] // 2, known.shape[1]
    middle = min(max(begin, r), end)
    for s in range(s0, s1):
        w, gate, up = weight[s], gate_up[s, middle:end], gate_up[s, size + middle : size + end]
        for c in range(begin, middle):
            gate_up[s, c] = w * known[s, c]
        for c in range(gate.shape[0]):  # without a choice or a sum of indices in it, it is vectorised
            gate[c] = w * (silu(gate[c]) * up[c])


@serial
def total(sums: Array, like: Array) -> Array:
    """The threads' sums ``[threads, T, H]`` added up, in the dtype of ``like``, the tokens ``[T, H]``."""
    out = np.empty(like.shape, like.dtype)
    for t in range(out.shape[0]):
        for h in range(out.shape[1]):
            value = sums[0, t, h]
            for thread in range(1, sums.shape[0]):
                value += sums[thread, t, h]
            out[t, h] = narrow(value, like[t, h])
    return out


@serial
def run_starts(sub_expert: Array) -> Array:
    """Where runs of equal values begin, and their end: int64 ``[G + 1]``."""
    pairs = sub_expert.shape[0]
    starts = np.empty(pairs + 1, np.int64)
    groups = 0
    for s in range(pairs):
        if s == 0 or sub_expert[s] != sub_expert[s - 1]:
            starts[groups] = s
            groups += 1
    starts[groups] = pairs
    return starts[: groups + 1]


def _gated_experts(
    threads: int,
    gate_up: Array,
    down: Array,
    x: Array,
    token: Array,
    sub_expert: Array,
    weight: Array,
    known: Array,
    neurons: int,
    n: int,
) -> Array:
    pairs, size, r = token.shape[0], neurons // n, known.shape[1]
    tokens = widened(x)
    starts = run_starts(sub_expert)
    hidden = np.empty((pairs, 2 * size), np.float32)
    runs = (size + RUN - 1) // RUN
    both = share_tasks(starts, runs, 2, threads)
    for thread in numba.prange(threads):
        for task in range(both[thread], both[thread + 1]):
            group, part, run = task // (2 * runs), task // runs % 2, task % runs
            begin, end = max(r, run * RUN), min((run + 1) * RUN, size)
            which = sub_expert[starts[group]]
            row = which // n * 2 * neurons + part * neurons + which % n * size + begin
            multiply_run(
                gate_up, row, end - begin, tokens, token, starts[group], starts[group + 1], hidden, part * size + begin
            )
    bounds = share_tasks(starts, runs, 1, threads)
    sums = np.zeros((threads, x.shape[0], x.shape[1]), np.float32)
    for thread in numba.prange(threads):
        for task in range(bounds[thread], bounds[thread + 1]):
            group, begin = task // runs, task % runs * RUN
            end = min(begin + RUN, size)
            s0, s1 = starts[group], starts[group + 1]
            activate(hidden, weight, known, begin, end, s0, s1)
            row = sub_expert[s0] * size + begin
            add_run(down, row, end - begin, hidden[:, begin:], token, s0, s1, sums[thread])
    return total(sums, x)


gated_experts = Kernel(serial(_gated_experts), parallel(_gated_experts))
"""Gate and up projections, activation and down projection of selected sub-experts.

Called with: gate_up ``[E * 2C, H]`` and down ``[E * C, H]`` (uint16 bits of bfloat16, or fp32); x ``[T, H]``, either;
token, sub_expert int64 ``[S]``, sorted by sub-expert; weight fp32 ``[S]``; known fp32 ``[S, r]``, activations of the
first r neurons that need not be computed; neurons: C; n: sub-experts of an expert. Returns ``[T, H]`` in the dtype of
x, rounded once.
"""

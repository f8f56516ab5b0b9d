"""A layer of SiLU-gated sub-experts that keeps some of their neurons, in bfloat16 for many tokens.

The same as ``neurons``, from a few tokens per sub-expert on, by products of bfloat16 pairs: tokens that share a
sub-expert keep different neurons, so up and down rows of all of them are multiplied in tiles, and what a token skips
counts as zero. It saves the time of what is not looked at; activations are rounded to bfloat16 before the down
projection, as in a model that runs in bfloat16. Knows the usual activation only, and no biases.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .compiled import inner, narrow, parallel, serial, share_tasks
from .gated import run_starts, total
from .gated_pairs import BLOCK, add_pairs_of_rows, interleave, project
from .neurons import bound, by_value, score_gates
from .threads import Kernel

Array = Any


@serial
def _least(score: Array, mine: Array, count: int, threshold: float) -> Any:
    """The least score that a token keeps; those equal to it that it does not keep are lowered."""
    least, equals, same = bound(score, mine, count, threshold)
    if equals != same:
        for s in mine:
            for c in range(score.shape[1]):
                if score[s, c] == least:
                    if equals <= 0:
                        score[s, c] = -np.float32(np.inf)
                    equals -= 1
    return least


@inner
def _activate(
    gate: Array, up: Array, score: Array, least: Array, token: Array, s0: int, s1: int, begin: int, end: int, out: Array
) -> None:
    """``gate * up`` of the pairs ``s0 .. s1`` as bits of bfloat16, zero where the score is below the token's least."""
    for s in range(s0, s1):
        bar = least[token[s]]
        for c in range(begin, end):
            out[s, c] = narrow(gate[s, c] * up[s, c] if score[s, c] >= bar else np.float32(0), out[s, c])


def _neuron_pairs(
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
) -> Array:
    pairs, size, hidden = token.shape[0], neurons // n, x.shape[1]
    starts = run_starts(sub_expert)
    gate = np.empty((pairs, size), np.float32)
    score = np.empty((pairs, size), np.float32)
    runs = (size + BLOCK - 1) // BLOCK
    bounds = share_tasks(starts, runs, 1, threads)
    for thread in numba.prange(threads):
        for task in range(bounds[thread], bounds[thread + 1]):
            group, begin = task // runs, task % runs * BLOCK
            s0, s1, end = starts[group], starts[group + 1], min(begin + BLOCK, size)
            which = sub_expert[s0]
            row = which // n * 2 * neurons + which % n * size + begin
            project(gate_up, row, end - begin, x, token, s0, s1, gate, begin)
            score_gates(gate, score, s0, s1, begin, end, weight, scale, which)
    order, first = by_value(token, x.shape[0])
    least = np.empty(x.shape[0], np.float32)
    for thread in numba.prange(threads):
        for t in range(thread, x.shape[0], threads):
            least[t] = _least(score, order[first[t] : first[t + 1]], count[t], threshold)
    up = np.empty((pairs, size), np.float32)
    active = np.empty((pairs, size), np.uint16)
    sums = np.zeros((threads, x.shape[0], hidden), np.float32)
    for thread in numba.prange(threads):
        words = np.empty((BLOCK // 2, hidden), np.uint32)
        for task in range(bounds[thread], bounds[thread + 1]):
            group, begin = task // runs, task % runs * BLOCK
            s0, s1, end = starts[group], starts[group + 1], min(begin + BLOCK, size)
            which = sub_expert[s0]
            row = (which // n * 2 + 1) * neurons + which % n * size + begin
            project(gate_up, row, end - begin, x, token, s0, s1, up, begin)
            _activate(gate, up, score, least, token, s0, s1, begin, end, active)
            interleave(down, which * size + begin, end - begin, words)
            add_pairs_of_rows(words, (end - begin) // 2, active, begin, token, s0, s1, sums[thread])
    return total(sums, x)


neuron_pairs = Kernel(serial(_neuron_pairs), parallel(_neuron_pairs))
"""The kept neurons of selected sub-experts.

Called as ``gated_neurons``; gate_up, down and x as in ``gated_pairs``. Only where ``dots.has_products_of_pairs``.
"""

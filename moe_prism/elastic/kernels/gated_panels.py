"""A layer of SiLU-gated sub-experts in bfloat16, by products of pairs on weights that are laid out for them.

A panel is a matrix of 64 columns whose rows come in pairs: word (p, j) holds the bfloat16 of rows 2p and, above it,
2p + 1 of column j, which is what one product takes. A thread reads a panel from its first byte to its last, for all
tokens that need it, so reading is as fast as memory with one token and arithmetic does not wait for it with many. Knows
the usual activation only, and no biases.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .compiled import inner, narrow, parallel, round_into, serial, share_tasks
from .dots import COLUMNS, TILE, sum_one, sum_tile, sum_two
from .gated import run_starts
from .neurons import by_value
from .silu import silu
from .threads import Kernel

Array = Any
NEURONS = COLUMNS // 2  # of a panel of gate and up: their gate columns, then their up columns
ROW = 4 * COLUMNS  # bytes
TOGETHER = 32  # tokens whose projections are kept while a panel is at hand


@serial
def add_products(
    panel: int, count: int, values: int, width: int, row: Array, outs: int, span: int, place: Array, s0: int, s1: int
) -> None:
    """``count`` row pairs of a panel times ``s0 .. s1``, added to 64 sums each.

    Pair s has its weights, as words, at ``values + width * row[s]`` and its sums at ``outs + span * place[s]``.
    """
    s = s0
    while s < s1:
        v, o = values + width * row[s], outs + span * place[s]
        if s1 - s >= TILE:
            sum_tile(
                panel,
                ROW,
                (v, values + width * row[s + 1], values + width * row[s + 2], values + width * row[s + 3]),
                (o, outs + span * place[s + 1], outs + span * place[s + 2], outs + span * place[s + 3]),
                count,
            )
            s += TILE
        elif s1 - s >= 2:
            sum_two(panel, ROW, (v, values + width * row[s + 1]), (o, outs + span * place[s + 1]), count)
            s += 2
        else:
            sum_one(panel, ROW, (v,), (o,), count)
            s += 1


@inner
def _activate(projected: Array, count: int, weight: Array, s0: int, active: Array, column: int) -> None:
    """``weight * silu(gate) * up`` of ``count`` pairs from ``s0`` on, into 32 columns of ``active``."""
    for i in range(count):
        scale, values, out = weight[s0 + i], projected[i], active[s0 + i, column : column + NEURONS]
        for c in range(NEURONS):
            out[c] = narrow(scale * (silu(values[c]) * values[NEURONS + c]), out[c])


def _gated_panels(
    threads: int, gate_up: Array, down: Array, x: Array, token: Array, unit: Array, weight: Array, parts: int
) -> Array:
    pairs, hidden, size = token.shape[0], x.shape[1], 2 * down.shape[2]
    panels, blocks = parts * size // NEURONS, hidden // COLUMNS
    starts, every = run_starts(unit), np.arange(pairs)
    active = np.empty((pairs, parts * size), np.uint16)
    bounds = share_tasks(starts, panels, 1, threads)
    for thread in numba.prange(threads):
        projected = np.empty((TOGETHER, COLUMNS), np.float32)
        for task in range(bounds[thread], bounds[thread + 1]):
            group, panel = task // panels, task % panels
            at = gate_up[unit[starts[group]] * panels + panel].ctypes.data
            for s0 in range(starts[group], starts[group + 1], TOGETHER):
                s1 = min(s0 + TOGETHER, starts[group + 1])
                projected[:] = 0
                outs = projected.ctypes.data - ROW * s0
                add_products(at, hidden // 2, x.ctypes.data, 2 * hidden, token, outs, ROW, every, s0, s1)
                _activate(projected, s1 - s0, weight, s0, active, panel * NEURONS)
    sums = np.zeros(x.shape, np.float32)
    out = np.empty(x.shape, np.uint16)
    # A thread has columns of its own: nobody adds up afterwards, and sums do not depend on how many threads there are.
    for thread in numba.prange(threads):
        first, last = blocks * thread // threads, blocks * (thread + 1) // threads
        for group in range(len(starts) - 1):
            s0, s1 = starts[group], starts[group + 1]
            for part in range(parts):
                for block in range(first, last):
                    at = down[unit[s0] * parts + part, block].ctypes.data
                    values, outs = active.ctypes.data + 2 * size * part, sums.ctypes.data + ROW * block
                    add_products(at, size // 2, values, 2 * parts * size, every, outs, 4 * hidden, token, s0, s1)
        for t in range(x.shape[0]):
            round_into(sums[t, COLUMNS * first : COLUMNS * last], out[t, COLUMNS * first : COLUMNS * last])
    return out


_on_one, _on_many = serial(_gated_panels), parallel(_gated_panels)
gated_panels = Kernel(_on_one, _on_many)
"""Gate and up projections, activation and down projection of selected units, each of ``parts`` sub-experts in a row.

Called with: gate_up uint32 ``[S * c / 32, H / 2, 64]``, panels of S sub-experts of c neurons; down uint32
``[S, H / 64, c / 2, 64]``; x ``[T, H]``, bits of bfloat16, contiguous; token, unit int64 ``[P]``, sorted by unit;
weight fp32 ``[P]``; parts. c is a multiple of 32, H of 64. Returns bits of bfloat16 ``[T, H]``, rounded once;
activations are rounded before the down projection. A token's result depends neither on the other tokens nor on the
number of threads, nor on whether whole experts or all their sub-experts are named. Only where
``dots.has_products_of_pairs``.
"""


@serial
def _whole_on_one(threads: int, gate_up: Array, down: Array, x: Array, index: Array, weight: Array, n: int) -> Array:
    token, expert, weights = _pairs(index, weight)
    return _on_one(threads, gate_up, down, x, token, expert, weights, n)


@serial
def _whole_on_many(threads: int, gate_up: Array, down: Array, x: Array, index: Array, weight: Array, n: int) -> Array:
    token, expert, weights = _pairs(index, weight)
    return _on_many(threads, gate_up, down, x, token, expert, weights, n)


@serial
def _pairs(index: Array, weight: Array) -> Any:
    """(token, expert) of every slot, sorted by expert."""
    k = index.shape[1]
    every = index.copy().reshape(-1)
    order, _ = by_value(every, every.max() + 1 if len(every) else 0)  # an expert's tokens in their order
    token, expert, weights = order // k, np.empty(len(order), np.int64), np.empty(len(order), np.float32)
    for i in range(len(order)):
        expert[i], weights[i] = index[token[i], order[i] % k], weight[token[i], order[i] % k]
    return token, expert, weights


whole_panels = Kernel(_whole_on_one, _whole_on_many)
"""The same for all routed experts of all tokens, of n sub-experts each, in one call.

Called with: gate_up, down, x; index int32 or int64 ``[T, k]``, routed experts; weight fp32 ``[T, k]``; n.
"""

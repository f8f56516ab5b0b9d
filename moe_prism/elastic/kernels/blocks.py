"""Sub-experts whose gate, up and down rows lie together, some of a layer's at a time.

What comes out of a pair does not depend on which others are computed in the same call, nor on the number of threads:
every sub-expert's down projection is two sums of fixed halves. Knows the usual activation only, and no biases.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from .compiled import RUN, parallel, serial, share_tasks
from .gated import activate
from .products import multiply_run
from .sums import add_run
from .threads import Kernel

Array = Any


def _gated_blocks(
    threads: int,
    rows: Array,
    x: Array,
    token: Array,
    weight: Array,
    at: Array,
    starts: Array,
    first: Array,
    size: int,
    out: Array,
) -> None:
    pairs = at.shape[0]
    mine, weights, known = token[at], weight[at], np.empty((0, 0), np.float32)
    hidden = np.empty((pairs, 2 * size), np.float32)
    runs = (size + RUN - 1) // RUN
    both = share_tasks(starts, runs, 2, threads)
    for thread in numba.prange(threads):
        for task in range(both[thread], both[thread + 1]):
            group, part, run = task // (2 * runs), task // runs % 2, task % runs
            begin, end = run * RUN, min((run + 1) * RUN, size)
            row, column = first[group] + part * size + begin, part * size + begin
            multiply_run(rows, row, end - begin, x, mine, starts[group], starts[group + 1], hidden, column)
    halves = np.zeros((2, pairs, x.shape[1]), np.float32)
    each, middle = np.arange(pairs), size // 8 * 4
    bounds = share_tasks(starts, 2, 1, threads)
    for thread in numba.prange(threads):
        for task in range(bounds[thread], bounds[thread + 1]):
            group, half = task // 2, task % 2
            begin, end = half * middle, middle if half == 0 else size
            s0, s1 = starts[group], starts[group + 1]
            activate(hidden, weights, known, begin, end, s0, s1)
            row = first[group] + 2 * size + begin
            add_run(rows, row, end - begin, hidden[:, begin:], each, s0, s1, halves[half])
    for pair in range(pairs):
        for h in range(x.shape[1]):
            out[at[pair], h] = halves[0, pair, h] + halves[1, pair, h]


gated_blocks = Kernel(serial(_gated_blocks), parallel(_gated_blocks))
"""Gate and up projections, activation and down projection of some sub-experts.

Called with: rows ``[R, H]`` (uint16 bits of bfloat16, or fp32); x fp32 ``[T, H]``; token int64 ``[S]`` and weight fp32
``[S]`` of all pairs; at int64 ``[P]``, the pairs to compute, those of a sub-expert next to each other; starts int64
``[G + 1]``, where each sub-expert's begin in ``at``; first int64 ``[G]``, each one's first row: its gate, up and down
rows follow; size: neurons of a sub-expert; out fp32 ``[S, H]``, of which the rows ``at`` are written.
"""

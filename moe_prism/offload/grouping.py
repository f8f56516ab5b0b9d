"""The blocks of a step, and where a batch's pairs are: small loops that are dear in a step of one token.

Knows arrays only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..elastic.kernels.compiled import serial

Array = Any


@serial
def block_values(starts: Array, sub_expert: Array, weight: Array, first: int) -> Any:
    """The block of every run and the sum of its weights: int64 and float64 ``[G]``."""
    groups = len(starts) - 1
    numbers, values = np.empty(groups, np.int64), np.zeros(groups)
    for group in range(groups):
        numbers[group] = sub_expert[starts[group]] + first
        for pair in range(starts[group], starts[group + 1]):
            values[group] += weight[pair]
    return numbers, values


@serial
def pairs_of(batch: Array, starts: Array) -> Any:
    """The pairs of some runs.

    Args:
        batch: int64 ``[B, 2]``, numbers of runs and the slots of their blocks.
        starts: int64 ``[G + 1]`` of all runs.

    Returns:
        int64: their positions ``[P]``, where each run's begin among these ``[B + 1]``, and the slots ``[B]``.
    """
    bounds = np.zeros(len(batch) + 1, np.int64)
    for i in range(len(batch)):
        bounds[i + 1] = bounds[i] + starts[batch[i, 0] + 1] - starts[batch[i, 0]]
    at = np.empty(bounds[-1], np.int64)
    for i in range(len(batch)):
        for j in range(bounds[i], bounds[i + 1]):
            at[j] = starts[batch[i, 0]] + j - bounds[i]
    return at, bounds, batch[:, 1].copy()


@serial
def split_pairs(token: Array, slot: Array, sub_expert: Array, weight: Array, low: Array) -> Any:
    """The pairs outside of ``low``, bool ``[T, k, N]``, and those in it: token, slot, sub-expert and weight of each."""
    n, count = low.shape[2], 0
    for pair in range(len(token)):
        count += low[token[pair], slot[pair], sub_expert[pair] % n]
    which = np.empty(len(token), np.int64)
    inside, outside = len(token) - count, 0
    for pair in range(len(token)):
        if low[token[pair], slot[pair], sub_expert[pair] % n]:
            which[inside] = pair
            inside += 1
        else:
            which[outside] = pair
            outside += 1
    a, b = which[:outside], which[outside:]
    return (token[a], slot[a], sub_expert[a], weight[a]), (token[b], slot[b], sub_expert[b], weight[b])

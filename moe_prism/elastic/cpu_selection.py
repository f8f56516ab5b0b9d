"""Plain selection on a CPU in one compiled call: at one token, two dozen small tensor operations would cost as
much as the experts.

It gives what ``selection`` gives, pair for pair. Knows nothing of floors or caps.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .kernels.neurons import bound, by_value
from .selection import Selection


def select(scores: Tensor, weights: Tensor, index: Tensor, budgets: Tensor, weighted: bool) -> Selection:
    """Every token's best ``budgets[t]`` candidates, sorted by sub-expert.

    Args:
        scores: ``[T, k, N]``.
        weights: ``[T, k]`` routing weights.
        index: int64 ``[T, k]`` routed experts.
        budgets: int64 ``[T]``, at least 1.
        weighted: multiply scores by routing weights.
    """
    found = _select(scores.float().numpy(), weights.float().numpy(), index.numpy(), budgets.numpy(), weighted)
    return Selection(*map(torch.from_numpy, found))


def best_candidates(scores: Tensor, weights: Tensor, budgets: Tensor, weighted: bool) -> Tensor:
    """What ``select`` takes, as bool ``[T, k, N]``; its arguments."""
    return torch.from_numpy(_best(scores.float().numpy(), weights.float().numpy(), budgets.numpy(), weighted))


def gather_candidates(chosen: Tensor, index: Tensor, weights: Tensor) -> Selection:
    """Any choice of candidates, bool ``[T, k, N]``, as a selection; the others as of ``select``."""
    return Selection(*map(torch.from_numpy, _gather(chosen.numpy(), index.numpy(), weights.float().numpy())))


def select_all(weights: Tensor, index: Tensor) -> Selection:
    """Full budget: every token's routed experts, as a selection with one sub-expert per expert.

    Args:
        weights: ``[T, k]`` routing weights.
        index: int64 ``[T, k]`` routed experts.
    """
    return Selection(*map(torch.from_numpy, _select_all(weights.float().numpy(), index.numpy())))


@numba.njit(cache=True, nogil=True)
def _best(scores: Any, weights: Any, budgets: Any, weighted: bool) -> Any:
    tokens, k, n = scores.shape
    chosen = np.zeros((tokens, k, n), np.bool_)
    pooled = np.empty((k, n), np.float32)
    slots = np.arange(k)
    for t in range(tokens):
        top = 0
        for s in range(1, k):
            if weights[t, s] > weights[t, top]:
                top = s
        for s in range(k):
            for i in range(n):
                value = scores[t, s, i] * weights[t, s] if weighted else scores[t, s, i]
                pooled[s, i] = np.inf if np.isnan(value) else value  # torch sorts NaN above all
        first = 0
        for i in range(1, n):
            if pooled[top, i] > pooled[top, first]:
                first = i
        pooled[top, first] = np.inf
        least, equals, _ = bound(pooled, slots, budgets[t], np.inf)
        for s in range(k):
            for i in range(n):
                equal = equals > 0 and pooled[s, i] == least
                equals -= equal
                chosen[t, s, i] = equal or pooled[s, i] > least
    return chosen


@numba.njit(cache=True, nogil=True)
def _gather(chosen: Any, index: Any, weights: Any) -> Any:
    tokens, k, n = chosen.shape
    total = 0
    for t in range(tokens):
        for s in range(k):
            for i in range(n):
                total += chosen[t, s, i]
    token = np.empty(total, np.int64)
    slot = np.empty(total, np.int64)
    sub_expert = np.empty(total, np.int64)
    count = 0
    for t in range(tokens):
        for s in range(k):
            for i in range(n):
                if chosen[t, s, i]:
                    token[count], slot[count], sub_expert[count] = t, s, index[t, s] * n + i
                    count += 1
    return _sorted(token, slot, sub_expert, weights)


@numba.njit(cache=True, nogil=True)
def _select(scores: Any, weights: Any, index: Any, budgets: Any, weighted: bool) -> Any:
    return _gather(_best(scores, weights, budgets, weighted), index, weights)


@numba.njit(cache=True, nogil=True)
def _select_all(weights: Any, index: Any) -> Any:
    tokens, k = index.shape
    token = np.empty(tokens * k, np.int64)
    slot = np.empty(tokens * k, np.int64)
    expert = np.empty(tokens * k, np.int64)
    for t in range(tokens):
        for s in range(k):
            token[t * k + s], slot[t * k + s], expert[t * k + s] = t, s, index[t, s]
    return _sorted(token, slot, expert, weights)


@numba.njit(cache=True, nogil=True)
def _sorted(token: Any, slot: Any, sub_expert: Any, weights: Any) -> Any:
    """The pairs, which are in the order of tokens, by sub-expert, and their weights."""
    order, _ = by_value(sub_expert, sub_expert.max() + 1 if len(sub_expert) else 0)
    weight = np.empty(order.shape[0], np.float32)
    for i in range(order.shape[0]):
        weight[i] = weights[token[order[i]], slot[order[i]]]
    return token[order], slot[order], sub_expert[order], weight

"""Selection that looks at the whole batch: in a decode step the cost is the number of different sub-experts.

Every token is sure of its floor. Beyond it, a token runs for free what the step loads anyway; with a cap,
what is loaded is chosen for the batch. Knows nothing of weights or time.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from ..errors import PrismError
from .dial import StepBudgets
from .selection import best, first_candidates


def choose(pooled: Tensor, weights: Tensor, index: Tensor, step: StepBudgets, num_sub_experts: int) -> Tensor:
    """Which candidates every token runs.

    Plain selection (no floor): its own best ``k_active``. With a floor: its own best ``k_min``, then up to
    ``k_active`` more of those that some token of the step loads. With a cap as well: a set of sub-experts is
    chosen greedily by total score, first until every token's floor and first candidate are in it, then up to
    the cap; tokens take their best ``k_active`` of the set. Floors come before the cap.

    Args:
        pooled: fp32 ``[T, k, N]``, from ``pooled_scores``.
        weights: ``[T, k]``.
        index: int64 ``[T, k]`` routed experts.
        step: budgets of the tokens.
        num_sub_experts: E * N.

    Returns:
        bool ``[T, k, N]``.

    Raises:
        PrismError: a cap on a device other than the CPU; the greedy choice is sequential.
    """
    first = first_candidates(pooled, weights)
    if step.k_min is None:
        return best(pooled, first, step.k_active)
    n = pooled.shape[2]
    candidate = (index[..., None] * n + torch.arange(n, device=index.device)).flatten(1)
    if step.cap is None:
        loaded = torch.zeros(num_sub_experts, dtype=torch.bool, device=pooled.device)
        loaded[candidate[best(pooled, first, step.k_min).flatten(1)]] = True
    elif pooled.device.type != "cpu":
        raise PrismError(f"a cap on different sub-experts works on a CPU only, not on {pooled.device}")
    else:
        loaded = torch.from_numpy(
            _greedy_set(
                pooled.flatten(1).nan_to_num(0.0, torch.inf, -torch.inf).numpy(),
                candidate.numpy(),
                first.numpy(),
                step.k_min.numpy(),
                step.k_active.numpy(),
                num_sub_experts,
                step.cap,
            )
        )
    within = pooled.masked_fill(~loaded[candidate].view_as(pooled), -torch.inf)
    return best(within, first, step.k_active)


@numba.njit(cache=True, nogil=True)
def _greedy_set(score: Any, candidate: Any, first: Any, floor: Any, budget: Any, num_sub_experts: int, cap: int) -> Any:
    """The sub-experts to load, bool ``[E * N]``.

    ``score`` and ``candidate`` are ``[T, k * N]``, the rest ``[T]``. ``value[0]`` is the total score that
    tokens below their floor would get from a sub-expert and ``value[1]`` that of tokens between floor and
    budget; ``wanting`` counts those tokens, since sums of rounded scores do not return to zero.
    """
    tokens, width = score.shape
    loaded = np.zeros(num_sub_experts, np.bool_)
    value = np.zeros((2, num_sub_experts))
    wanting = np.zeros((2, num_sub_experts), np.int64)
    covered = np.zeros(tokens, np.int64)
    reachable = np.zeros(tokens, np.int64)
    for t in range(tokens):
        for j in range(width):
            if score[t, j] > -np.inf:
                reachable[t] += 1
                value[0, candidate[t, j]] += score[t, j]
                wanting[0, candidate[t, j]] += 1
    count = 0
    turn = 0
    while True:
        chosen = -1
        if turn < tokens:  # every token's first candidate
            if score[turn, first[turn]] > -np.inf and not loaded[candidate[turn, first[turn]]]:
                chosen = candidate[turn, first[turn]]
            turn += 1
            if chosen < 0:
                continue
        else:
            for stage in range(2):
                if chosen >= 0 or (stage == 1 and count >= cap):
                    break
                for s in range(num_sub_experts):
                    wanted = not loaded[s] and wanting[stage, s] > 0
                    if wanted and (chosen < 0 or value[stage, s] > value[stage, chosen]):
                        chosen = s
            if chosen < 0:
                return loaded
        loaded[chosen] = True
        count += 1
        for t in range(tokens):
            for j in range(width):
                if candidate[t, j] != chosen or score[t, j] == -np.inf:
                    continue
                covered[t] += 1
                floor_met = covered[t] == min(floor[t], reachable[t])
                budget_met = covered[t] == min(budget[t], reachable[t])
                if not (floor_met or budget_met):
                    continue
                for i in range(width):
                    if score[t, i] > -np.inf:
                        s = candidate[t, i]
                        if floor_met:
                            value[0, s] -= score[t, i]
                            wanting[0, s] -= 1
                        if floor_met and not budget_met:
                            value[1, s] += score[t, i]
                            wanting[1, s] += 1
                        if budget_met and not floor_met:
                            value[1, s] -= score[t, i]
                            wanting[1, s] -= 1

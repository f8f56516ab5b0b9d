"""Compiled minimisation by reassigning all neurons at once: the machinery of the ``balanced`` solver.

Knows nothing of swaps, restarts or schedules' merits; it runs the schedule that it is given.

The dropped mass of a token is a concave function of its sub-experts' masses (a minimum over which ones to
switch off). Fixing what each token switches off under the current partition therefore gives an upper bound that
touches the objective there and is a plain sum of costs, one per neuron and sub-expert; lowering the bound lowers
the objective at least as much. Fixing it on a random batch of tokens only adds noise that shrinks as batches
grow: an annealing whose every step moves all neurons.
"""

from __future__ import annotations

import numpy as np

from .compiled import F32, I64, compiled

# Tokens whose masses are computed together: their rows stay in the first-level cache for the second use.
_BLOCK = 16
# Rounding makes endless tiny "gains"; a relative gain below this counts as none.
_TOLERANCE = 1e-6


@compiled
def _block_masses(impact: F32, tokens: I64, masks: F32, masses: F32) -> None:
    """masses [len(tokens), N] of the given rows; masks [N, C] is 1 where the neuron is a member."""
    num_sub_experts, num_neurons = masks.shape
    done = 0
    # Four rows at a time share the loads of a mask.
    while done + 4 <= tokens.size:
        row0, row1 = impact[tokens[done]], impact[tokens[done + 1]]
        row2, row3 = impact[tokens[done + 2]], impact[tokens[done + 3]]
        for n in range(num_sub_experts):
            mask = masks[n]
            sum0, sum1, sum2, sum3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for c in range(num_neurons):
                sum0 += mask[c] * row0[c]
                sum1 += mask[c] * row1[c]
                sum2 += mask[c] * row2[c]
                sum3 += mask[c] * row3[c]
            masses[done, n], masses[done + 1, n] = sum0, sum1
            masses[done + 2, n], masses[done + 3, n] = sum2, sum3
        done += 4
    for t in range(done, tokens.size):
        row = impact[tokens[t]]
        for n in range(num_sub_experts):
            mask = masks[n]
            total = np.float32(0)
            for c in range(num_neurons):
                total += mask[c] * row[c]
            masses[t, n] = total


@compiled
def linear_costs(impact: F32, tokens: I64, members: I64, rank_weights: F32, costs: F32) -> float:
    """Linearise the objective at a partition.

    Args:
        impact: [B, C].
        tokens: indices of the rows to use, repeats allowed.
        members: [N, C/N] neuron indices of every sub-expert.
        rank_weights: [N] share of the K's that switch off a token's r-th lightest sub-expert.
        costs: [N, C], filled with the mass lost if neuron c were in sub-expert n and no token changed its choice.

    Returns:
        The objective of ``members`` over these tokens.
    """
    num_sub_experts, num_neurons = costs.shape
    masks = np.zeros((num_sub_experts, num_neurons), np.float32)
    for n in range(num_sub_experts):
        for c in members[n]:
            masks[n, c] = 1
    costs[:] = 0
    masses = np.empty((_BLOCK, num_sub_experts), np.float32)
    value = 0.0
    for first in range(0, tokens.size, _BLOCK):
        block = tokens[first : first + _BLOCK]
        _block_masses(impact, block, masks, masses)
        for t in range(block.size):
            row = impact[block[t]]
            for n in range(num_sub_experts):
                mass = masses[t, n]
                rank = 0
                for m in range(n):
                    rank += masses[t, m] <= mass
                for m in range(n + 1, num_sub_experts):
                    rank += masses[t, m] < mass
                weight = rank_weights[rank]
                if weight > 0:
                    value += weight * mass
                    cost = costs[n]
                    for c in range(num_neurons):
                        cost[c] += weight * row[c]
    return value


@compiled
def kth_smallest(values: F32, k: int) -> np.float32:
    """The value that would be at position k if ``values`` were sorted; reorders them (Hoare's selection).

    NumPy's ``partition`` does the same, but takes Numba ten seconds to compile.
    """
    low, high = 0, values.size - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] < pivot:
                i += 1
            while values[j] > pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if k <= j:
            high = j
        elif k >= i:
            low = i
        else:
            break
    selected: np.float32 = values[k]
    return selected


@compiled
def rebalance(costs: F32, members: I64) -> float:
    """Lower the summed cost of a partition, sizes kept, in place; returns the change (never positive).

    Takes two sub-experts, pools their neurons and deals them out again at the median of the cost difference,
    which is the exact optimum for the two; every pair in turn, once. Repeating it until nothing moves costs more
    than it gains, since the costs change with every move.
    """
    num_sub_experts, size = members.shape
    pool = np.empty(2 * size, np.int64)
    difference = np.empty(2 * size, np.float32)
    reordered = np.empty_like(difference)
    change = 0.0
    for i in range(num_sub_experts - 1):
        for j in range(i + 1, num_sub_experts):
            highest, lowest = np.float32(-np.inf), np.float32(np.inf)
            for slot in range(size):
                c, d = members[i, slot], members[j, slot]
                pool[slot], pool[size + slot] = c, d
                difference[slot] = costs[i, c] - costs[j, c]
                difference[size + slot] = costs[i, d] - costs[j, d]
                highest = max(highest, difference[slot])
                lowest = min(lowest, difference[size + slot])
            if highest <= lowest:
                continue
            reordered[:] = difference
            median = kth_smallest(reordered, size - 1)
            ties = size
            for p in range(2 * size):
                ties -= difference[p] < median
            # Of the neurons exactly at the median, the first ones (members of i first) stay in or go to i.
            to_i, to_j = 0, 0
            for p in range(2 * size):
                goes_to_i = difference[p] < median
                if difference[p] == median and ties > 0:
                    goes_to_i = True
                    ties -= 1
                if goes_to_i:
                    members[i, to_i] = pool[p]
                    to_i += 1
                    if p >= size:
                        change += difference[p]
                else:
                    members[j, to_j] = pool[p]
                    to_j += 1
                    if p < size:
                        change -= difference[p]
    return change


@compiled
def descend(impact: F32, members: I64, rank_weights: F32, batches: I64, draws: I64, max_full_rounds: int) -> float:
    """Reassign neurons on growing random batches, then on all tokens until it settles; in place on ``members``.

    Args:
        impact: [B, C].
        members: [N, C/N]; changed. With no batches the objective never rises.
        rank_weights: [N], see :func:`linear_costs`.
        batches: sizes of the successive random batches.
        draws: [sum of batches] token indices, used in order.
        max_full_rounds: steps on all tokens, at least 1; usually fewer are needed.

    Returns:
        An upper bound of the final objective, tight if it settled.
    """
    costs = np.empty((members.shape[0], impact.shape[1]), np.float32)
    used = 0
    for size in batches:
        linear_costs(impact, draws[used : used + size], members, rank_weights, costs)
        rebalance(costs, members)
        used += size
    everything = np.arange(impact.shape[0])
    bound = np.inf
    for _ in range(max_full_rounds):
        value = linear_costs(impact, everything, members, rank_weights, costs)
        change = rebalance(costs, members)
        bound = value + change
        if change >= -_TOLERANCE * value:
            break
    return bound

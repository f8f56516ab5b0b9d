"""Compiled arithmetic of one swap: what the objective gains when two neurons trade places.

Shared by every solver that swaps. Knows nothing of which swaps are worth trying.

Swapping neuron c of sub-expert i with neuron d of sub-expert j changes only the masses x = L[b, i] and
y = L[b, j], and keeps their sum s. The sum of the K smallest masses then depends on x and y alone through

    min(x, y, cap),    cap = min(o_K, s - o_(K-1)),

plus a term that the swap leaves alone, where o_1 <= o_2 <= ... are the other sub-experts' masses (o_0 = -inf,
and o_m = +inf past the last). The caps are kept per pair of sub-experts, so that trying a swap is one
vectorised pass over the tokens, whatever N and K are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .compiled import F32, I64, compiled


@compiled
def pair_index(i: int, j: int, num_sub_experts: int) -> int:
    """Position of the unordered pair {i, j} in a list of all N (N - 1) / 2 pairs."""
    low, high = (i, j) if i < j else (j, i)
    return low * num_sub_experts - low * (low + 1) // 2 + high - low - 1


@compiled
def masses_of(columns: F32, members: I64) -> F32:
    """L1 mass [N, B] of every sub-expert and token; columns [C, B], members [N, C/N] of neuron indices."""
    masses = np.zeros((members.shape[0], columns.shape[1]), np.float32)
    for n in range(members.shape[0]):
        for c in members[n]:
            for b in range(columns.shape[1]):
                masses[n, b] += columns[c, b]
    return masses


@compiled
def refresh_caps(masses: F32, i: int, j: int, ranks: I64, others: F32, caps: F32) -> None:
    """Fill caps [len(ranks), B] of the pair (i, j); ``ranks`` holds the K's, ``others`` [N, B] is scratch."""
    num_others = 0
    for n in range(masses.shape[0]):
        if n not in (i, j):
            others[num_others] = masses[n]
            num_others += 1
    # A bubble network over whole rows: each exchange is a vectorised pass, without a branch per token.
    for last in range(num_others - 1, 0, -1):
        for m in range(last):
            low, high = others[m], others[m + 1]
            for b in range(low.size):
                x, y = low[b], high[b]
                low[b] = x if x < y else y
                high[b] = y if x < y else x
    for k in range(ranks.size):
        switched_off = ranks[k]
        cap = caps[k]
        if switched_off <= num_others:
            cap[:] = others[switched_off - 1]
        else:
            cap[:] = np.inf
        if switched_off >= 2:
            below = others[switched_off - 2]
            for b in range(cap.size):
                room = masses[i, b] + masses[j, b] - below[b]
                cap[b] = cap[b] if cap[b] < room else room


@compiled
def swap_delta(mass_i: F32, mass_j: F32, column_c: F32, column_d: F32, caps: F32) -> float:
    """Change of the objective (summed over the ranks) if c leaves i for j and d comes back; all rows [B]."""
    total = np.float32(0.0)
    for k in range(caps.shape[0]):
        cap = caps[k]
        part = np.float32(0.0)
        for b in range(cap.size):
            x, y = mass_i[b], mass_j[b]
            shift = column_d[b] - column_c[b]
            x_new, y_new = x + shift, y - shift
            old = x if x < y else y
            new = x_new if x_new < y_new else y_new
            old = old if old < cap[b] else cap[b]
            new = new if new < cap[b] else cap[b]
            part += new - old
        total += part
    return float(total)


@compiled
def apply_swap(mass_i: F32, mass_j: F32, column_c: F32, column_d: F32) -> None:
    """Move the masses of the pair as :func:`swap_delta` assumed."""
    for b in range(mass_i.size):
        shift = column_d[b] - column_c[b]
        mass_i[b] += shift
        mass_j[b] -= shift


@compiled
def anneal(
    columns: F32,
    members: I64,
    ranks: I64,
    picks: I64,
    chances: NDArray[np.float64],
    initial_temperature: float,
    cooling: float,
) -> tuple[float, int]:
    """Simulated annealing by random swaps (arXiv 2510.19366, phase 1.2), in place on ``members``.

    Args:
        columns: [C, B] impact, one row per neuron.
        members: [N, C/N] neuron indices of every sub-expert; changed.
        ranks: the numbers of switched-off sub-experts K that the objective averages over.
        picks: [swaps, 4] random sub-expert, offset 1..N-1 to the other sub-expert, and a slot in each.
        chances: [swaps] uniform in [0, 1), compared with exp(-delta / T).
        initial_temperature: T of the first swap, in the unit of the objective (0 accepts only gains).
        cooling: factor on T after every swap.

    Returns:
        The accumulated change of the objective (the incremental value) and the number of accepted swaps.
    """
    num_sub_experts = members.shape[0]
    num_tokens = columns.shape[1]
    num_pairs = num_sub_experts * (num_sub_experts - 1) // 2
    masses = masses_of(columns, members)
    others = np.empty_like(masses)
    caps = np.empty((num_pairs, ranks.size, num_tokens), np.float32)
    stale = np.ones(num_pairs, np.bool_)
    temperature = initial_temperature
    change = 0.0
    accepted = 0
    for step in range(picks.shape[0]):
        i = picks[step, 0]
        j = (i + picks[step, 1]) % num_sub_experts
        pair = pair_index(i, j, num_sub_experts)
        if stale[pair]:
            refresh_caps(masses, i, j, ranks, others, caps[pair])
            stale[pair] = False
        c, d = members[i, picks[step, 2]], members[j, picks[step, 3]]
        delta = swap_delta(masses[i], masses[j], columns[c], columns[d], caps[pair]) / ranks.size
        if delta < 0.0 or (temperature > 0.0 and chances[step] < np.exp(-delta / temperature)):
            apply_swap(masses[i], masses[j], columns[c], columns[d])
            members[i, picks[step, 2]] = d
            members[j, picks[step, 3]] = c
            # The swapped pair's own caps see neither mass; every other pair's do.
            stale[:] = True
            stale[pair] = False
            change += delta
            accepted += 1
        temperature *= cooling
    return change, accepted

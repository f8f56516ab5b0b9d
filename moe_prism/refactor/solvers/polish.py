"""Compiled last refinement of a partition: exact swaps, the most promising ones first.

Knows nothing of how the partition was found.
"""

from __future__ import annotations

import numpy as np

from .compiled import F32, I64, compiled
from .descent import linear_costs, rebalance
from .swaps import apply_swap, masses_of, refresh_caps, swap_delta


@compiled
def polish(
    impact: F32, columns: F32, members: I64, ranks: I64, rank_weights: F32, candidates: int, max_rounds: int
) -> None:
    """Swap neurons while that lowers the objective; in place on ``members``.

    At a settled partition no swap lowers the linear bound, but the objective lies below the bound, so the swaps
    that raise it least are the ones worth evaluating. Each round takes, for every pair of sub-experts, the
    ``candidates`` cheapest movers of each side, tries their swaps exactly, cheapest first, and keeps every gain;
    then the bound is taken anew.

    Args:
        impact, columns: the same numbers as [B, C] and as [C, B].
        members: [N, C/N]; changed, never for the worse.
        ranks: the K's that the objective averages over.
        rank_weights: [N], see :func:`~moe_prism.refactor.solvers.descent.linear_costs`.
        candidates: neurons of each side of a pair, 1..C/N.
        max_rounds: stops earlier when a round finds nothing.
    """
    num_sub_experts, size = members.shape
    everything = np.arange(impact.shape[0])
    costs = np.empty((num_sub_experts, impact.shape[1]), np.float32)
    caps = np.empty((ranks.size, impact.shape[0]), np.float32)
    cost_i, cost_j = np.empty(size, np.float32), np.empty(size, np.float32)
    for _ in range(max_rounds):
        accepted = 0
        linear_costs(impact, everything, members, rank_weights, costs)
        rebalance(costs, members)
        masses = masses_of(columns, members)
        others = np.empty_like(masses)
        for i in range(num_sub_experts - 1):
            for j in range(i + 1, num_sub_experts):
                refresh_caps(masses, i, j, ranks, others, caps)
                for slot in range(size):
                    c, d = members[i, slot], members[j, slot]
                    cost_i[slot] = costs[j, c] - costs[i, c]
                    cost_j[slot] = costs[i, d] - costs[j, d]
                order_i, order_j = np.argsort(cost_i), np.argsort(cost_j)
                # Diagonals of the candidate square: the sum of the two ranks stands for the sum of the costs.
                for diagonal in range(2 * candidates - 1):
                    for p in range(max(0, diagonal - candidates + 1), min(diagonal, candidates - 1) + 1):
                        slot_i, slot_j = order_i[p], order_j[diagonal - p]
                        c, d = members[i, slot_i], members[j, slot_j]
                        delta = swap_delta(masses[i], masses[j], columns[c], columns[d], caps)
                        if delta < 0.0:
                            apply_swap(masses[i], masses[j], columns[c], columns[d])
                            members[i, slot_i], members[j, slot_j] = d, c
                            accepted += 1
        if accepted == 0:
            break

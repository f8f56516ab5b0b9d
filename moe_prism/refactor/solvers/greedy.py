"""The paper's starting partition: load balancing by total impact, blind to which tokens it comes from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .base import SOLVERS, Solver


@SOLVERS.register("greedy")
@dataclass(frozen=True)
class Greedy(Solver):
    """Neurons by falling total impact, each to the sub-expert with the least impact so far that has room.

    The greedy initialisation of arXiv 2510.19366, phase 1.2. Deterministic: the seed is not used.
    """

    def partition(
        self, impact: NDArray[np.float32], num_sub_experts: int, switched_off: int | None, seed: int
    ) -> NDArray[np.int64]:
        """O(C N) after one pass over the impact; ties go to the lower index."""
        totals = impact.sum(axis=0)
        capacity = impact.shape[1] // num_sub_experts
        load = np.zeros(num_sub_experts)
        room = np.full(num_sub_experts, capacity)
        labels = np.empty(impact.shape[1], dtype=np.int64)
        for neuron in np.argsort(-totals, kind="stable"):
            lightest = int(np.argmin(load))
            labels[neuron] = lightest
            load[lightest] += totals[neuron]
            room[lightest] -= 1
            if room[lightest] == 0:
                load[lightest] = np.inf
        return labels

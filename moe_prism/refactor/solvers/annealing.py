"""The paper's solver: simulated annealing by random swaps from the greedy start."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import PrismError
from .base import SOLVERS, Solver, labels_of, members_of, switched_off_counts
from .greedy import Greedy
from .swaps import anneal


@SOLVERS.register("annealing")
@dataclass(frozen=True)
class Annealing(Solver):
    """Swap two random neurons of different sub-experts; accept a loss with probability exp(-delta / T).

    arXiv 2510.19366, phase 1.2, defaults included; T starts at ``initial_temperature`` and is multiplied by
    ``cooling`` after every swap. Delta is the change of the objective in absolute L1 units of the impact as
    given: the paper states no normalisation, so none is made here, and scaling the impact changes the walk
    (with the defaults T is below 1e-9 after about 5,000 swaps, so most of the run is a descent at any usual
    scale). Returns the last state, as the paper does, not the best one seen.
    """

    swaps: int = 100_000
    """Swaps tried, at least 0. The paper's number."""
    initial_temperature: float = 100.0
    """T0, at least 0, in the unit of the objective. The paper's number."""
    cooling: float = 0.995
    """alpha, in (0, 1]. The paper's number."""

    def __post_init__(self) -> None:
        if self.swaps < 0:
            raise PrismError(f"annealing: swaps must be 0 or more, got {self.swaps}")
        if not self.initial_temperature >= 0 or not np.isfinite(self.initial_temperature):
            raise PrismError(f"annealing: initial_temperature must be 0 or more, got {self.initial_temperature}")
        if not 0 < self.cooling <= 1:
            raise PrismError(f"annealing: cooling must be in (0, 1], got {self.cooling}")

    def partition(
        self, impact: NDArray[np.float32], num_sub_experts: int, switched_off: int | None, seed: int
    ) -> NDArray[np.int64]:
        """O(tokens) per swap by incremental update."""
        members = members_of(Greedy().partition(impact, num_sub_experts, switched_off, seed), num_sub_experts)
        rng = np.random.default_rng(seed)
        size = members.shape[1]
        picks = rng.integers(
            [0, 1, 0, 0], [num_sub_experts, num_sub_experts, size, size], size=(self.swaps, 4), dtype=np.int64
        )
        anneal(
            np.ascontiguousarray(impact.T),
            members,
            switched_off_counts(num_sub_experts, switched_off),
            picks,
            rng.random(self.swaps),
            self.initial_temperature,
            self.cooling,
        )
        return labels_of(members)

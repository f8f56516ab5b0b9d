"""Our solver and the default: reassign all neurons at once on growing random batches of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import PrismError
from .base import SOLVERS, Solver, labels_of, members_of, switched_off_counts
from .descent import descend, linear_costs
from .importance import Importance
from .polish import polish
from .swaps import anneal

# The schedule below was chosen on profiles of a trained 256-neuron model and on 1,024-neuron synthetic ones;
# halving or doubling the first two traded time for quality along the same curve.
_FIRST_BATCH = 64
_FIRST_STEPS = 20
_FULL_ROUNDS = 2
# A run costs in proportion to the neurons, annealing with a number of swaps does not: small experts can have more.
_NEURONS_OF_DEFAULT_RUNS = 400


@SOLVERS.register("balanced")
@dataclass(frozen=True)
class Balanced(Solver):
    """Alternate (a) which sub-experts each token switches off and (b) where every neuron is cheapest.

    Under the tokens' current choices the objective of arXiv 2510.19366 (phase 1.2) is bounded by a sum of costs,
    one per neuron and sub-expert, so that (b) is an assignment under equal sizes, solved pair by pair. A step on
    all tokens never makes the objective worse but stops at the first local optimum; steps on random batches of
    64, 128, 256, ... tokens wander past the poor ones first, at a fraction of the cost. A run starts from a
    random partition, ends with steps on all tokens, and costs about eight passes over the impact. The best of
    ``runs`` runs and of the ``importance`` partition is kept.

    Example recipe::

        solver: balanced
        solver_options: {runs: 8, polish_rounds: 10}
    """

    runs: int | None = None
    """Independent runs, at least 1; the time is proportional. They are compared by the last step's bound. By default as
    many as 400 neurons go into an expert, 1 to 8: about a tenth of the time of the paper's annealing, or less."""
    polish_rounds: int = 0
    """At most so many rounds of exact swaps, the most promising first, on the best runs: one of every six, at least
    one and at most five. 10 rounds are plenty."""
    cold_swaps: int = 0
    """Random swaps at the very end, only gains accepted: refinement by the paper's annealing at temperature 0."""

    def __post_init__(self) -> None:
        if self.runs is not None and self.runs < 1:
            raise PrismError(f"balanced: runs must be 1 or more, got {self.runs}")
        for name in ("polish_rounds", "cold_swaps"):
            if getattr(self, name) < 0:
                raise PrismError(f"balanced: {name} must be 0 or more, got {getattr(self, name)}")

    def partition(
        self, impact: NDArray[np.float32], num_sub_experts: int, switched_off: int | None, seed: int
    ) -> NDArray[np.int64]:
        """O(B C N) per step on all tokens; memory a few rows beside the impact, one copy of it if it refines."""
        impact = np.ascontiguousarray(impact)
        num_tokens, num_neurons = impact.shape
        ranks = switched_off_counts(num_sub_experts, switched_off)
        rank_weights = (np.arange(num_sub_experts)[:, None] < ranks).mean(axis=1).astype(np.float32)
        batches = _batch_sizes(num_tokens)
        rng = np.random.default_rng(seed)

        def value_of(members: NDArray[np.int64]) -> float:
            scratch = np.empty((num_sub_experts, num_neurons), np.float32)
            return linear_costs(impact, np.arange(num_tokens), members, rank_weights, scratch)

        by_importance = Importance().partition(impact, num_sub_experts, switched_off, seed)
        runs = min(8, max(1, _NEURONS_OF_DEFAULT_RUNS // num_neurons)) if self.runs is None else self.runs
        found = [members_of(by_importance, num_sub_experts)]
        values = [value_of(found[0])]
        for _ in range(runs):
            members = rng.permutation(num_neurons).reshape(num_sub_experts, -1)
            draws = rng.integers(num_tokens, size=batches.sum())
            values.append(descend(impact, members, rank_weights, batches, draws, _FULL_ROUNDS))
            found.append(members)
        finalists = [found[index] for index in np.argsort(values, kind="stable")[: finalists_of(runs)]]
        best = finalists[0]
        if self.polish_rounds or self.cold_swaps:
            columns = np.ascontiguousarray(impact.T)
            size = best.shape[1]
            if self.polish_rounds:
                for members in finalists:
                    polish(impact, columns, members, ranks, rank_weights, min(16, size), self.polish_rounds)
                best = min(finalists, key=value_of)
            upper = [num_sub_experts, num_sub_experts, size, size]
            picks = rng.integers([0, 1, 0, 0], upper, size=(self.cold_swaps, 4), dtype=np.int64)
            anneal(columns, best, ranks, picks, np.zeros(self.cold_swaps), 0.0, 1.0)
        return labels_of(best)


def finalists_of(runs: int) -> int:
    """How many of the candidates are polished: polishing one costs about as much as three more runs."""
    return min(5, max(1, runs // 3))


def _batch_sizes(num_tokens: int) -> NDArray[np.int64]:
    """Doubling sizes up to half of all tokens; fewer steps at larger sizes, as their noise is smaller."""
    first = max(1, min(_FIRST_BATCH, num_tokens // 8))
    sizes: list[int] = []
    size = first
    while 2 * size < num_tokens:
        sizes += [size] * round(_FIRST_STEPS * (first / size) ** 0.5)
        size *= 2
    return np.array(sizes, dtype=np.int64)

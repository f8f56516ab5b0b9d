"""What a partitioning solver is: it splits an expert's C neurons into N sub-experts of equal size.

Knows nothing of models: a problem is a matrix of non-negative numbers, token by neuron.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from ...registry import Registry
from .objective import check_problem

BEST_SOLVER = "balanced"  # at the objective; which partition loses least of a model is another question


class Solver(ABC):
    """A way to partition neurons. Concrete solvers are frozen dataclasses whose fields are their options."""

    def solve(
        self, impact: NDArray[np.float32], num_sub_experts: int, switched_off: int | None = None, seed: int = 0
    ) -> NDArray[np.int64]:
        """Partition the neurons of one expert.

        Args:
            impact: [B, C] non-negative finite importance of every neuron for every token of the expert, float32
                (other float dtypes are converted). Left unchanged.
            num_sub_experts: N, a divisor of C.
            switched_off: the number K of sub-experts that the partition should lose cheaply, 1..N-1, or None
                for the mean over all of them.
            seed: of every random choice. The same input and seed give the same labels on the same machine, however
                many threads run.

        Returns:
            Labels [C] int64 in [0, N), every one used C/N times.

        Raises:
            PrismError: an ill-posed problem (see :func:`~moe_prism.refactor.solvers.objective.check_problem`).
        """
        impact = check_problem(impact, num_sub_experts, switched_off)
        num_neurons = impact.shape[1]
        if num_sub_experts == 1:
            return np.zeros(num_neurons, dtype=np.int64)
        if num_sub_experts == num_neurons:
            # One neuron each: every partition is the same up to names.
            return np.arange(num_neurons, dtype=np.int64)
        return self.partition(impact, num_sub_experts, switched_off, seed)

    @abstractmethod
    def partition(
        self, impact: NDArray[np.float32], num_sub_experts: int, switched_off: int | None, seed: int
    ) -> NDArray[np.int64]:
        """:meth:`solve` on a checked problem with 1 < N < C."""


SOLVERS: Registry[Solver] = Registry("solver")


def members_of(labels: NDArray[np.int64], num_sub_experts: int) -> NDArray[np.int64]:
    """[N, C/N] neuron indices of every sub-expert, ascending in each; needs equal sizes."""
    return np.argsort(labels, kind="stable").reshape(num_sub_experts, -1)


def labels_of(members: NDArray[np.int64]) -> NDArray[np.int64]:
    """The inverse of :func:`members_of`: labels [C] from members [N, C/N]."""
    labels = np.empty(members.size, dtype=np.int64)
    labels[members] = np.arange(members.shape[0])[:, None]
    return labels


def switched_off_counts(num_sub_experts: int, switched_off: int | None) -> NDArray[np.int64]:
    """The K's that the objective averages over: the given one, or 1..N-1."""
    return np.arange(1, num_sub_experts) if switched_off is None else np.array([switched_off], dtype=np.int64)

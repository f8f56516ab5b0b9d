"""Neurons sorted by how much they do over all tokens: hot ones together, idle ones together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .base import SOLVERS, Solver


@SOLVERS.register("importance")
@dataclass(frozen=True)
class Importance(Solver):
    """Sub-expert 0 takes the C/N neurons of greatest total impact, sub-expert 1 the next, and so on.

    The best partition for a gate that keeps the same sub-experts for every token; the seed is not used.
    """

    def partition(
        self, impact: NDArray[np.float32], num_sub_experts: int, switched_off: int | None, seed: int
    ) -> NDArray[np.int64]:
        """One stable sort; ties keep the stored order."""
        labels = np.empty(impact.shape[1], dtype=np.int64)
        falling = np.argsort(-impact.sum(axis=0), kind="stable")
        labels[falling] = np.repeat(np.arange(num_sub_experts), impact.shape[1] // num_sub_experts)
        return labels

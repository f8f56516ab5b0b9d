"""The baseline that looks at nothing: neurons in stored order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .base import SOLVERS, Solver


@SOLVERS.register("contiguous")
@dataclass(frozen=True)
class Contiguous(Solver):
    """Sub-expert n takes neurons n C/N .. (n + 1) C/N - 1 as they are stored; the seed is not used."""

    def partition(
        self, impact: NDArray[np.float32], num_sub_experts: int, switched_off: int | None, seed: int
    ) -> NDArray[np.int64]:
        """The identity permutation, cut into equal blocks."""
        return np.repeat(np.arange(num_sub_experts), impact.shape[1] // num_sub_experts)

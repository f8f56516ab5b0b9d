"""The two halves apart: what an elastic model gains without our scheduling, and the other way round.

The system alone is here: continuous batching in which every request runs at full budget, as an inelastic model would.
``ABLATION`` names all four combinations. Knows nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..cost_model import Floats
from ..requests import Columns
from .base import POLICIES
from .continuous import Continuous

ABLATION = {
    "neither": "fifo-original",
    "model only": "fifo",
    "system only": "system-only",
    "both": "continuous",
}


@POLICIES.register("system-only")
@dataclass(frozen=True)
class SystemOnly(Continuous):
    """Continuous batching of the original model, which has one budget: everybody runs at it, whatever they want."""

    def bounds(self, columns: Columns, full_budget: int) -> tuple[Floats, Floats]:
        """Full budget for everyone."""
        full = np.full(len(columns.arrival), float(full_budget))
        return full, full

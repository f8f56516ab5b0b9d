"""The two halves apart: what elastic models gain without our scheduling, and the other way round.

The elastic model alone is ``fifo``: simple batches at the highest floor in them. The system alone is here: continuous
batching in which every request runs at full budget, as an inelastic model would. Both together are ``continuous``, none
of the two is ``fifo-original``. Knows nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..requests import State, StepPlan
from .base import POLICIES
from .continuous import Continuous


@POLICIES.register("system-only")
@dataclass(frozen=True)
class SystemOnly(Continuous):
    """Continuous batching of the original model."""

    def plan(self, state: State, now: float) -> StepPlan:
        """See ``Policy.plan``."""
        full = state.limits.full_budget
        waiting = [replace(r, k_min=full, k_active=full) for r in state.waiting]
        running = [replace(r, request=replace(r.request, k_min=full, k_active=full)) for r in state.running]
        return super().plan(State(waiting, running, state.limits), now)

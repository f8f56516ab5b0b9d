"""Policies that run one batch to its end at one budget, as the paper's do (arXiv 2510.19366, phase 2 and set-up).

While a batch runs nothing is admitted, and all of its requests run at the batch's budget. Tokens of a request, where
a formula needs them, are those of its prompt and those it may generate.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..requests import Request, State, StepPlan, memory_of
from .base import POLICIES, Policy, batch_plan, positive, those_that_fit


@dataclass(frozen=True)
class BatchPolicy(Policy):
    """Keeps a batch together; subclasses say what the next one is."""

    def plan(self, state: State, now: float) -> StepPlan:
        """See ``Policy.plan``."""
        if state.running:
            return batch_plan((), state.running, max(r.budget for r in state.running), state.limits)
        if not state.waiting:
            return StepPlan()
        launched = self.launch(state, now)
        if not isinstance(launched, tuple):
            return StepPlan(wake=launched)
        admitted, k_active = launched
        return batch_plan(admitted, (), k_active, state.limits)

    @abstractmethod
    def launch(self, state: State, now: float) -> tuple[Sequence[Request], int] | float:
        """The next batch and its budget, or when to ask again; something waits and nothing runs."""


def _highest_floor(requests: Sequence[Request]) -> int:
    return max(r.k_min for r in requests)


@POLICIES.register("fifo")
@dataclass(frozen=True)
class Fifo(BatchPolicy):
    """Everything that waits, as soon as the engine is free, at the highest floor among it."""

    def launch(self, state: State, now: float) -> tuple[Sequence[Request], int] | float:
        """See ``BatchPolicy.launch``."""
        admitted = those_that_fit(state.waiting, state)
        return admitted, _highest_floor(admitted)


@POLICIES.register("fifo-original")
@dataclass(frozen=True)
class FifoOriginal(BatchPolicy):
    """FIFO with the original model: every batch at full budget."""

    def launch(self, state: State, now: float) -> tuple[Sequence[Request], int] | float:
        """See ``BatchPolicy.launch``."""
        return those_that_fit(state.waiting, state), state.limits.full_budget


@POLICIES.register("full-batch")
@dataclass(frozen=True)
class FullBatch(BatchPolicy):
    """Wait until a batch is full, then run it at the highest floor in it.

    Attributes:
        max_wait: seconds after which a batch that never fills starts all the same, so that the last requests end.
    """

    max_wait: float = 30.0

    def __post_init__(self) -> None:
        positive(max_wait=self.max_wait)

    def launch(self, state: State, now: float) -> tuple[Sequence[Request], int] | float:
        """See ``BatchPolicy.launch``."""
        admitted = those_that_fit(state.waiting, state)
        full = len(admitted) == state.limits.max_running or len(admitted) < len(state.waiting)
        due = min(r.arrival for r in state.waiting) + self.max_wait
        return (admitted, _highest_floor(admitted)) if full or now >= due else due


@POLICIES.register("virtual-queues")
@dataclass(frozen=True)
class VirtualQueues(BatchPolicy):
    """The paper's scheduler: M virtual queues, one per budget m; a request is in every queue that it can run in.

    Utility ``U_m = sum of tokens in Q_m / C(|Q_m|, m)``; the queue with the highest is launched when the engine is
    free. Two triggers come first: a queue that fills a batch, and the oldest request waiting longer than T_max, for
    which the best queue that holds it is launched. What is launched leaves all queues at once. A queue longer than a
    batch is cut to its oldest requests. Among equal queues the one with the larger budget runs.

    Attributes:
        t_max: T_max in seconds.
    """

    t_max: float = 5.0

    def __post_init__(self) -> None:
        positive(t_max=self.t_max)

    def launch(self, state: State, now: float) -> tuple[Sequence[Request], int] | float:
        """See ``BatchPolicy.launch``."""
        waiting = state.waiting
        floor = np.array([r.k_min for r in waiting])
        most = np.array([r.k_active for r in waiting])
        size = np.array([memory_of(r) for r in waiting])
        oldest = int(np.argmin([r.arrival for r in waiting]))
        best: tuple[tuple[int, float, int], np.ndarray] | None = None
        overdue = now - waiting[oldest].arrival >= self.t_max
        for m in range(1, state.limits.full_budget + 1):
            inside = np.flatnonzero((floor <= m) & (m <= most))
            if not len(inside) or (overdue and oldest not in inside):
                continue
            full = len(inside) >= state.limits.max_running
            inside = inside[: state.limits.max_running]
            utility = float(size[inside].sum()) / self.cost.table(len(inside), m)
            rank = (int(full), utility, m)
            if best is None or rank > best[0]:
                best = rank, inside
        assert best is not None  # every request is in the queue of its floor
        (_, _, m), inside = best
        return those_that_fit([waiting[i] for i in inside.tolist()], state), m

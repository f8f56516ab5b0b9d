"""Policies that run one batch to its end at one budget, as the paper's do (arXiv 2510.19366, phase 2 and set-up).

While a batch runs nothing is admitted, and all of its requests run at the batch's budget, or at the most that they
want if that is less (the paper's requests want no less than full budget). Priorities and objectives play no part.
Tokens of a request, where a formula needs them, are those of its prompt and those it may generate.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..requests import Columns, Request, Running, State, StepPlan
from .base import POLICIES, Policy, memory_left, positive, prefill_pieces, those_that_fit


@dataclass(frozen=True)
class BatchPolicy(Policy):
    """Keeps a batch together; subclasses say what the next one is."""

    def plan(self, state: State, now: float) -> StepPlan:
        """See ``Policy.plan``; prompts first, as the batch starts: who is done with its own waits for the others."""
        if state.running:
            # its members' budgets say what the batch runs at; in vLLM, which admits by itself, the first have none yet
            k_active = max(max(r.budget, r.request.k_min) for r in state.running)
            return self._step((), state.running, k_active, state)
        if not state.waiting:
            return StepPlan()
        launched = self.launch(state, now)
        if isinstance(launched, float):
            return StepPlan(wake=launched)
        admitted, k_active = launched
        return self._step(admitted, (), k_active, state)

    @abstractmethod
    def launch(self, state: State, now: float) -> tuple[Sequence[Request], int] | float:
        """The next batch and its budget, or when to ask again; something waits and nothing runs."""

    def budget(self, request: Request, k_active: int) -> int:
        """Of one request in a batch at ``k_active``."""
        return min(k_active, request.k_active)

    def _step(self, admitted: Sequence[Request], running: Sequence[Running], k_active: int, state: State) -> StepPlan:
        requests = [*(r.request for r in running), *admitted]
        pending = [(r.request.id, r.prefill_left) for r in running if r.prefill_left]
        pending += [(r.id, r.prompt_tokens) for r in admitted]
        pieces = prefill_pieces(pending, state.limits)
        budgets = {r.id: self.budget(r, k_active) for r in requests if not pieces or r.id in pieces}
        return StepPlan(tuple(r.id for r in admitted), budgets, pieces, batch=k_active)


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
    """FIFO with the original model, which has one budget: every batch at full budget, whatever anyone wants."""

    def launch(self, state: State, now: float) -> tuple[Sequence[Request], int] | float:
        """See ``BatchPolicy.launch``."""
        return those_that_fit(state.waiting, state), state.limits.full_budget

    def budget(self, request: Request, k_active: int) -> int:
        """Full budget."""
        return k_active


@POLICIES.register("full-batch")
@dataclass(frozen=True)
class FullBatch(BatchPolicy):
    """Wait until a batch is full, by places or by memory, then run it at the highest floor in it.

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
    which the best queue that holds it is launched. What is launched leaves all queues at once. Of a queue longer than a
    batch, or larger than the memory, the oldest requests that fit count and run. Among equal queues the one with the
    larger budget runs.

    Attributes:
        t_max: T_max in seconds.
    """

    t_max: float = 5.0

    def __post_init__(self) -> None:
        positive(t_max=self.t_max)

    def launch(self, state: State, now: float) -> tuple[Sequence[Request], int] | float:
        """See ``BatchPolicy.launch``."""
        columns = Columns.of(state.waiting)
        size = columns.prompt_tokens + columns.max_tokens
        oldest = int(np.argmin(columns.arrival))
        overdue = now - columns.arrival[oldest] > self.t_max
        places, memory = state.limits.max_running, memory_left(state)
        best: tuple[tuple[bool, float, int], list[int]] | None = None
        for m in range(1, state.limits.full_budget + 1):
            inside = np.flatnonzero((columns.k_min <= m) & (m <= columns.k_active))
            if not len(inside) or (overdue and oldest not in inside):
                continue
            full = len(inside) >= places
            inside = inside[:places]
            inside = inside[: int(np.searchsorted(np.cumsum(size[inside]), memory, side="right"))]
            utility = float(size[inside].sum()) / self.cost.table(len(inside), m)
            rank = (full, utility, m)
            if best is None or rank > best[0]:
                best = rank, inside.tolist()
        assert best is not None  # every request is in the queue of its floor
        (_, _, m), chosen = best
        return [state.waiting[i] for i in chosen], m

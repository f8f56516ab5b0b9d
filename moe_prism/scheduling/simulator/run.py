"""Discrete-event simulation of one or many replicas behind a router.

A step's cost is predicted, everything else is exact: the same policies run as in an engine. Knows no trace.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...errors import PrismError
from ..admission import Admission, Unmeetable
from ..cost_model import CostModel
from ..outcomes import Job, Outcome
from ..policies import Policy
from .replica import Replica
from .router import Router

PROGRESS_EVERY = 1000


@dataclass(frozen=True)
class Simulation:
    """What a simulation found.

    Attributes:
        outcomes: one per job, in their order.
        seconds: from the first arrival to the last token.
        busy: share of that time in which a replica ran steps, mean over replicas.
        steps: of all replicas.
    """

    outcomes: list[Outcome]
    seconds: float
    busy: float
    steps: int


def simulate(
    jobs: Sequence[Job],
    policy: Policy,
    cost: CostModel,
    admission: Admission,
    *,
    replicas: int = 1,
    lanes: Sequence[int] | None = None,
    repeat: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Simulation:
    """Serve all jobs.

    Args:
        jobs: sorted by arrival.
        policy: of every replica; it keeps nothing between calls.
        cost: what a step takes; the policy and the admission may have been given another one, to be wrong.
        admission: answers every request first; its limits are those of one replica.
        replicas: how many engines.
        lanes: see ``Router``.
        repeat: see ``replica``.
        progress: called with (requests ended, in all).

    Raises:
        PrismError: jobs are unsorted, repeat an id, or one could never run.
    """
    if replicas < 1 or repeat < 1:
        raise PrismError(f"replicas and repeat must be 1 or more, got {replicas} and {repeat}")
    _check(jobs)
    outcomes = [_admit(job, admission) for job in jobs]
    coming = [o for o in outcomes if not o.refused]
    coming.reverse()
    engines = [Replica(i, policy, cost, admission.limits, repeat) for i in range(replicas)]
    router = Router(replicas, lanes, cost, admission.limits)
    events: list[tuple[float, int]] = []
    start = now = jobs[0].request.arrival if jobs else 0.0
    left = len(coming)
    while left:
        arrival = coming[-1].job.request.arrival if coming else math.inf
        while events and events[0][0] != engines[events[0][1]].ends:
            heapq.heappop(events)  # its steps were cut by an arrival
        if not events and not coming:
            raise RuntimeError("requests wait, but no replica has anything to do: the policy lost them")
        if events and events[0][0] <= arrival:
            now, which = heapq.heappop(events)
            for outcome in engines[which].advance(now):
                left -= 1
                router.finished(outcome)
                if progress is not None and left % PROGRESS_EVERY == 0:
                    progress(len(jobs) - left, len(jobs))
        else:
            now, outcome = arrival, coming.pop()
            which = outcome.replica = router.choose(outcome.job.request)
            engines[which].submit(outcome, now)
        if engines[which].ends < math.inf:
            heapq.heappush(events, (engines[which].ends, which))
    seconds = now - start
    busy = sum(engine.busy for engine in engines) / replicas / seconds if seconds else 0.0
    return Simulation(outcomes, seconds, busy, sum(engine.steps for engine in engines))


def _admit(job: Job, admission: Admission) -> Outcome:
    try:
        return Outcome(replace(job, request=admission(job.request)))
    except Unmeetable:
        return Outcome(job, refused=True)


def _check(jobs: Sequence[Job]) -> None:
    seen: set[str] = set()
    last = -math.inf
    for job in jobs:
        request = job.request
        if not 1 <= job.output_tokens <= request.max_tokens:
            raise PrismError(
                f"request {request.id}: output_tokens must be from 1 to max_tokens = {request.max_tokens}, "
                f"got {job.output_tokens}"
            )
        if request.id in seen:
            raise PrismError(f"request id {request.id!r} is used twice")
        if not request.arrival >= last:
            raise PrismError(f"request {request.id}: arrival {request.arrival} is before the one in front ({last})")
        seen.add(request.id)
        last = request.arrival

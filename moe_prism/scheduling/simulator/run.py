"""Discrete-event simulation of one or many replicas behind a router.

A step's cost is predicted, everything else is exact: the same policies run as in an engine. The router sends a request
to the replica that is predicted to be done with its work first, when it comes; the work of a request is what it
would take at its floor in a full batch. With ``lanes`` a request prefers the replicas of its own floor. Knows no trace.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import PrismError
from ..cost_model import CostModel
from ..policies import Policy
from ..requests import Limits, Request
from .replica import Job, Outcome, Replica


@dataclass(frozen=True)
class Simulation:
    """What a simulation found.

    Attributes:
        outcomes: one per request, in order of arrival.
        seconds: from the first arrival to the last token.
        busy: share of that time in which a replica ran steps, mean over replicas.
        steps: of all replicas.
    """

    outcomes: list[Outcome]
    seconds: float
    busy: float
    steps: int


class Router:
    """Chooses a replica: predicted to finish its work first, within the lane of the request's floor if there are lanes.

    Args:
        replicas: how many.
        lanes: ascending floors; lane i takes floors above ``lanes[i - 1]`` up to ``lanes[i]``, the last one all above.
            Replicas are dealt to lanes in turn. None: one lane.
    """

    def __init__(self, replicas: int, lanes: Sequence[int] | None, cost: CostModel, limits: Limits) -> None:
        bounds = list(lanes or ())
        if bounds != sorted(set(bounds)) or len(bounds) > replicas:
            raise PrismError(f"lanes must be ascending floors, at most one per replica ({replicas}), got {bounds}")
        self._bounds = bounds[:-1]
        self._left = np.zeros(replicas)  # seconds of work that each still has
        count = max(1, len(bounds))
        self._members = [np.arange(lane, replicas, count) for lane in range(count)]
        self._cost, self._batch = cost, limits.max_running

    def choose(self, request: Request) -> int:
        """The replica of a request that comes now."""
        lane = int(np.searchsorted(self._bounds, request.k_min)) if self._bounds else 0
        members = self._members[lane]
        chosen = int(members[np.argmin(self._left[members])])
        self._left[chosen] += self._work(request)
        return chosen

    def finished(self, outcome: Outcome) -> None:
        """A request's work is done."""
        self._left[outcome.replica] -= self._work(outcome.job.request)

    def _work(self, request: Request) -> float:
        step = self._cost.table(self._batch, request.k_min) / self._batch
        prefill = self._cost.load([], 0.0, [request.prompt_tokens], [request.k_min])
        return self._cost.seconds(prefill) + request.max_tokens * step


def simulate(
    jobs: Sequence[Job],
    make_policy: Callable[[], Policy],
    cost: CostModel,
    limits: Limits,
    *,
    replicas: int = 1,
    lanes: Sequence[int] | None = None,
    repeat: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Simulation:
    """Serve all jobs.

    Args:
        jobs: sorted by arrival.
        make_policy: one policy per replica.
        cost: what a step takes.
        limits: of one replica.
        replicas: how many engines.
        lanes: see ``Router``.
        repeat: see ``replica``.
        progress: called with (requests ended, in all).

    Raises:
        PrismError: jobs are unsorted, repeat an id, or one could never run.
    """
    if replicas < 1 or repeat < 1:
        raise PrismError(f"replicas and repeat must be 1 or more, got {replicas} and {repeat}")
    _check(jobs, limits)
    engines = [Replica(i, make_policy(), cost, limits, repeat) for i in range(replicas)]
    router = Router(replicas, lanes, cost, limits)
    events: list[tuple[float, int]] = []
    outcomes: list[Outcome] = []
    now, ended, coming = 0.0, 0, 0
    while ended < len(jobs):
        arrival = jobs[coming].request.arrival if coming < len(jobs) else math.inf
        while events and events[0][0] != engines[events[0][1]].ends:
            heapq.heappop(events)  # its steps were cut by an arrival
        if not events and arrival == math.inf:
            raise RuntimeError("requests wait, but no replica has anything to do: the policy lost them")
        if events and events[0][0] <= arrival:
            now, which = heapq.heappop(events)
            for outcome in engines[which].advance(now):
                ended += 1
                router.finished(outcome)
                if progress is not None and ended % 1000 == 0:
                    progress(ended, len(jobs))
        else:
            now, job = arrival, jobs[coming]
            coming += 1
            which = router.choose(job.request)
            outcomes.append(engines[which].submit(job, now))
        if engines[which].ends < math.inf:
            heapq.heappush(events, (engines[which].ends, which))
    seconds = now - (jobs[0].request.arrival if jobs else 0.0)
    busy = sum(engine.busy for engine in engines) / replicas / seconds if seconds else 0.0
    return Simulation(outcomes, seconds, busy, sum(engine.steps for engine in engines))


def _check(jobs: Sequence[Job], limits: Limits) -> None:
    seen: set[str] = set()
    last = -math.inf
    for job in jobs:
        request = job.request
        limits.check(request)
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

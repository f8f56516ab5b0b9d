"""Which replica a request goes to. Knows nothing of what replicas do with it."""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence

from ...errors import PrismError
from ..cost_model import CostModel
from ..outcomes import Outcome
from ..requests import Limits, Request


class Router:
    """Sends a request to the replica that is predicted to finish its work first, among those of the request's lane.

    The work of a request is what it would take at its floor in a full batch. O(log replicas) a request.

    Args:
        replicas: how many.
        lanes: ascending floors; lane i takes floors above ``lanes[i - 1]`` up to ``lanes[i]``, the last one all above.
            Replicas are dealt to lanes in turn. None: one lane, floors are mixed.
        cost: of every replica.
        limits: of every replica.
    """

    def __init__(self, replicas: int, lanes: Sequence[int] | None, cost: CostModel, limits: Limits) -> None:
        bounds = list(lanes or ())
        if bounds != sorted(set(bounds)) or len(bounds) > replicas:
            raise PrismError(f"lanes must be ascending floors, at most one per replica ({replicas}), got {bounds}")
        self._bounds = bounds[:-1]
        count = max(1, len(bounds))
        self._left = [0.0] * replicas  # seconds of work that each still has
        # per lane: (seconds left, replica); an entry that no longer says what is left is stale
        self._heaps = [[(0.0, i) for i in range(lane, replicas, count)] for lane in range(count)]
        self._lane = [i % count for i in range(replicas)]
        self._cost, self._batch = cost, limits.max_running
        self._step: dict[int, float] = {}

    def choose(self, request: Request) -> int:
        """The replica of a request that comes now."""
        heap = self._heaps[bisect_left(self._bounds, request.k_min)]
        while heap[0][0] != self._left[heap[0][1]]:
            heapq.heappop(heap)
        chosen = heap[0][1]
        self._left[chosen] += self._work(request)
        heapq.heapreplace(heap, (self._left[chosen], chosen))
        return chosen

    def finished(self, outcome: Outcome) -> None:
        """A request's work is done."""
        replica = outcome.replica
        self._left[replica] = max(0.0, self._left[replica] - self._work(outcome.job.request))
        heapq.heappush(self._heaps[self._lane[replica]], (self._left[replica], replica))

    def _work(self, request: Request) -> float:
        k = request.k_min
        if k not in self._step:
            self._step[k] = self._cost.table(self._batch, k) / self._batch
        return self._cost.prefill_seconds(request.prompt_tokens, k, request.prompt_tokens) + (
            request.max_tokens * self._step[k]
        )

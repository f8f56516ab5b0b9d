"""Between asyncio and the engine: one thread runs the engine's steps, one call per step hands its events over.

Everything here but ``_run`` happens on the event loop, so there are no locks. Knows nothing of HTTP or of texts.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Sequence

from ..engine import Engine, FailedEvent, Generation, TokenEvent
from ..errors import PrismError
from ..scheduling import Admission
from .errors import ApiError
from .metrics import Metrics, Reason, Track

logger = logging.getLogger("moe_prism.serving")

Event = TokenEvent | FailedEvent
_IDLE_SECONDS = 0.5


class Mailbox:
    """Events of one HTTP request's generations, in the order in which they came.

    Attributes:
        names: of the generations.
        best_effort: no budget can meet the objectives that were asked for.
        patient: its reader is woken by ends of generations only; for replies that are sent whole.
    """

    def __init__(self, generations: Sequence[Generation], best_effort: bool, patient: bool) -> None:
        self.best_effort = best_effort
        self.patient = patient
        self.names = [generation.request.id for generation in generations]
        self._events: list[Event] = []
        self._came = asyncio.Event()

    def put(self, event: Event) -> None:
        """Hand one over."""
        self._events.append(event)
        if not self.patient or isinstance(event, FailedEvent) or event.finished is not None:
            self._came.set()

    async def take(self) -> list[Event]:
        """All that came since the last call; waits for one at least."""
        await self._came.wait()
        self._came.clear()
        events, self._events = self._events, []
        return events


class Bridge:
    """Runs an engine for the requests of a server.

    Args:
        engine: stepped by this object only.
        metrics: told what happens.
        max_waiting: requests that may wait for admission.
    """

    def __init__(self, engine: Engine, metrics: Metrics, max_waiting: int) -> None:
        self.engine = engine
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._open: dict[str, tuple[Track, Mailbox]] = {}
        self._draining = False
        self._stop = False
        self._seconds = 1.0  # of a request, lately
        self._empty = asyncio.Event()
        self._empty.set()
        self._admission = Admission(engine.policy.cost, engine.limits)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.watch(self._running, self._waiting, lambda: engine.stats.cache_use if self._open else 0.0)

    def start(self) -> None:
        """Start the engine's thread; call it on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its present step; open requests get no more events."""
        self._stop = True
        await asyncio.to_thread(self._thread.join)

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self.alive and not self._draining

    async def drain(self, seconds: float) -> None:
        """Refuse new requests and wait until the others have ended, so long at most; then abandon the rest."""
        self._draining = True
        try:
            await asyncio.wait_for(self._empty.wait(), seconds)
        except TimeoutError:
            logger.warning("abandoning %d requests after %g seconds of draining", len(self._open), seconds)
            for name in list(self._open):
                self.engine.cancel(name)
                self._end(name, "abort", FailedEvent(name, "the server is shutting down"))

    def submit(self, generations: Sequence[Generation], patient: bool) -> Mailbox:
        """Queue the generations of a request, all or none; see ``Mailbox`` for ``patient``.

        Raises:
            ApiError: 503 while draining, 429 if the queue is full, 400 if the engine could never run one.
        """
        if not self.ready:
            self._metrics.rejected()
            raise ApiError(503, "the server is shutting down; send it to another one", headers={"Retry-After": "5"})
        waiting = self._waiting()
        if waiting and waiting + len(generations) > self._max_waiting:
            self._metrics.rejected()
            raise ApiError(
                429,
                f"{waiting} requests are waiting and the queue holds {self._max_waiting}; try again later",
                code="queue_full",
                headers={"Retry-After": str(self._retry_after())},
            )
        try:
            requests = [self._admission(generation.request) for generation in generations]
            for generation in generations:
                self.engine.check(generation)
        except PrismError as error:
            raise ApiError(400, str(error)) from None
        mailbox = Mailbox(generations, any(request.best_effort for request in requests), patient)
        for generation in generations:
            self._open[generation.request.id] = (Track(generation.request), mailbox)
            self._metrics.arrived(len(generation.prompt))
            self.engine.submit(generation)
        self._empty.clear()
        return mailbox

    def close(self, mailbox: Mailbox) -> None:
        """Nobody reads it any more: what has not ended is cancelled."""
        for name in mailbox.names:
            self.finish(name, "abort")

    def finish(self, name: str, reason: Reason) -> None:
        """End a generation before the engine does; nothing happens if it has ended."""
        if name in self._open:
            self.engine.cancel(name)
            self._end(name, reason, None)

    def _run(self) -> None:
        plan = None
        while not self._stop:
            began = time.monotonic()
            try:
                events = self.engine.step()
            except Exception as error:
                logger.exception("an engine step failed")
                self._loop.call_soon_threadsafe(self._fail, f"the engine failed on this step: {error}")
                time.sleep(0.01)  # a fault that stays must not eat a core
                continue
            before, plan = plan, self.engine.stats.plan
            admitted = plan.admit if plan is not None and plan is not before else ()
            if events or admitted:
                self._loop.call_soon_threadsafe(self._deliver, events, admitted, began, time.monotonic())
            else:
                self.engine.wait(_IDLE_SECONDS)

    def _deliver(self, events: Sequence[Event], admitted: Sequence[str], began: float, now: float) -> None:
        for name in admitted:
            if name in self._open:
                self._metrics.admitted(began - self._open[name][0].request.arrival)
        if any(isinstance(event, FailedEvent) for event in events):
            self._metrics.step_failed()
        for event in events:
            found = self._open.get(event.id)
            if found is None:
                continue  # cancelled while the step ran
            track, mailbox = found
            if isinstance(event, FailedEvent):
                logger.error("request %s failed: %s", event.id, event.error)
                self._end(event.id, "error", event)
                continue
            self._metrics.token(track, event.budget, now)
            if event.finished is None:
                mailbox.put(event)
            else:
                self._end(event.id, "stop" if event.finished == "stop" else "length", event)

    def _fail(self, message: str) -> None:
        self._metrics.step_failed()
        for name in list(self._open):
            self.engine.cancel(name)
            self._end(name, "error", FailedEvent(name, message))

    def _end(self, name: str, reason: Reason, last: Event | None) -> None:
        track, mailbox = self._open.pop(name)
        self._metrics.ended(track, reason)
        if track.first is not None:
            self._seconds += 0.1 * (track.last - track.request.arrival - self._seconds)
        if last is not None:
            mailbox.put(last)
        if not self._open:
            self._empty.set()

    def _running(self) -> int:
        return min(self.engine.stats.running, len(self._open))

    def _waiting(self) -> int:
        return len(self._open) - self._running()

    def _retry_after(self) -> int:
        return min(60, max(1, math.ceil(self._seconds)))

"""The engine: it carries out a policy's plans with real forward passes.

``step`` takes new requests and cancellations, asks the policy, runs one forward over everything that takes part, draws
tokens and reports them. Requests join and leave between steps. Keys and values belong to one request: what one request
computed at its budget is never read by another. Knows no policy, no text and no network.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from transformers import PreTrainedModel

from ..errors import PrismError
from ..scheduling import Admission, Limits, Policy, State, StepPlan
from ..scheduling.requests import memory_of
from .memory import Memory
from .parts import Active, Part, parts_of, run_parts
from .requests import EngineStats, FailedEvent, Generation, TokenEvent, check_tokens
from .runner import Runner, require_room
from .sampling import Chosen, Sampler

Event = TokenEvent | FailedEvent


@dataclass
class _Inbox:
    """What other threads asked for since the last step."""

    submitted: dict[str, Generation] = field(default_factory=dict)
    cancelled: set[str] = field(default_factory=set)


class Engine:
    """Continuous batching of one elastic model.

    ``submit``, ``cancel``, ``check`` and ``stats`` may be called from any thread, ``step`` and ``wait`` from one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        limits: Limits,
        *,
        clock: Callable[[], float] = time.monotonic,
        hopeless: Literal["serve", "refuse"] = "serve",
    ) -> None:
        """Allocate the memory for keys and values.

        Args:
            model: from ``load_elastic``, at full budget.
            policy: decides who runs, and at which budgets.
            limits: ``memory_tokens`` is needed: so many tokens' keys and values are allocated.
            clock: seconds; requests' arrivals are on it.
            hopeless: what becomes of requests whose objectives no budget can meet: see ``Admission``.

        Raises:
            PrismError: limits do not fit the model, or the model is not at full budget.
            UnsupportedModelError: see ``Runner``.
        """
        if limits.memory_tokens is None:
            raise PrismError(
                "memory_tokens must be a number: tokens whose keys and values are allocated; such as "
                f"{limits.max_running} x the longest request"
            )
        self._runner = Runner(model, limits.memory_tokens)
        if limits.full_budget != self._runner.dial.full_budget:
            raise PrismError(
                f"full_budget must be the model's, {self._runner.dial.full_budget}, got {limits.full_budget}"
            )
        self.policy = policy
        self.limits = limits
        self.clock = clock
        self._admission = Admission(policy.cost, limits, hopeless)
        self._memory = Memory(limits.memory_tokens)
        self._waiting: dict[str, Generation] = {}
        self._running: dict[str, Active] = {}
        self._inbox = _Inbox()
        self._known: set[str] = set()
        self._admitted = 0
        self._changed = threading.Condition()
        self._asleep: float | None = None  # nothing to do before this time; None: there is
        self._stats = EngineStats()

    def check(self, generation: Generation) -> None:
        """Raise PrismError for a request that could never run here, or that ``hopeless`` refuses."""
        request, prompt = generation.request, generation.prompt
        self._admission(request)
        if len(prompt) != request.prompt_tokens:
            raise PrismError(
                f"request {request.id}: prompt_tokens must be the prompt's length, {len(prompt)}: "
                f"got {request.prompt_tokens}"
            )
        require_room(memory_of(request), self._runner.max_context, request.id)
        check_tokens(f"request {request.id}: prompt", prompt, self._runner.vocabulary)
        generation.sampling.check(self._runner.vocabulary)

    def submit(self, generation: Generation) -> None:
        """Let a request wait for its turn.

        Raises:
            PrismError: see ``check``; or its id is in use.
        """
        self.check(generation)
        generation = replace(generation, request=self._admission(generation.request))
        id = generation.request.id
        with self._changed:
            if id in self._known:
                raise PrismError(f"request id {id!r} is in use; ids must differ until a request has ended")
            self._known.add(id)
            self._inbox.submitted[id] = generation
            self._changed.notify_all()

    def cancel(self, id: str) -> None:
        """Drop a request before the next step, without an event; one that has ended or never was is ignored."""
        with self._changed:
            if id in self._known:
                self._inbox.cancelled.add(id)
                self._changed.notify_all()

    def wait(self, timeout: float) -> None:
        """Until there is something to do, the policy wants to be asked again, or ``timeout`` seconds have passed."""
        with self._changed:
            if self._inbox.submitted or self._inbox.cancelled:
                return
            if not self._running and not self._waiting:
                self._changed.wait(timeout)
            elif self._asleep is not None:
                left = min(timeout, self._asleep - self.clock())
                if left > 0:
                    self._changed.wait(left)

    @property
    def stats(self) -> EngineStats:
        """As of now, between steps; sums and plan are those of the steps so far."""
        return replace(
            self._stats,
            waiting=len(self._waiting) + len(self._inbox.submitted),
            running=len(self._running),
            cache_use=self._memory.used / self._memory.tokens,
        )

    @property
    def key_value_bytes(self) -> int:
        """Memory of all keys and values."""
        return self._runner.memory.bytes

    def step(self) -> list[Event]:
        """Run one step.

        Returns:
            One event for every token, and for every request that failed; nothing when idle.
        """
        began = time.perf_counter()
        self._take()
        if not self._waiting and not self._running:
            return []
        now = self.clock()
        try:
            state = State(
                [generation.request for generation in self._waiting.values()],
                [active.running() for active in self._running.values()],
                self.limits,
                self._admitted,
            )
            plan = self.policy.plan(state, now)
            self._refuse_bad(plan)
        except Exception as error:
            return self._fail([*self._waiting, *self._running], error)
        planned = time.perf_counter() - began
        self._asleep = None
        if not plan.budgets:
            self._asleep = float("inf") if plan.wake is None else plan.wake
            return []
        ran = 0.0
        try:
            for id in plan.admit:
                self._admit(id, plan.batch)
            parts = parts_of(plan, self._running)
            ran = -time.perf_counter()
            chosen = run_parts(parts, plan.budgets, plan.cap, self._runner, self._memory)
            ran += time.perf_counter()
            events = self._advance(parts, plan.budgets, chosen)
        except Exception as error:
            events = self._fail(dict.fromkeys([*plan.admit, *plan.budgets]), error)
        self._stats = EngineStats(
            budgets=plan.budgets,
            tokens=self._stats.tokens + sum(isinstance(event, TokenEvent) for event in events),
            steps=self._stats.steps + 1,
            policy_seconds=self._stats.policy_seconds + planned,
            model_seconds=self._stats.model_seconds + max(ran, 0.0),
            seconds=self._stats.seconds + time.perf_counter() - began,
            plan=plan,
        )
        return events

    def _take(self) -> None:
        """New requests and cancellations."""
        with self._changed:
            inbox, self._inbox = self._inbox, _Inbox()
        self._waiting.update(inbox.submitted)
        for id in inbox.cancelled:
            self._end(id)

    def _end(self, id: str) -> None:
        """Forget a request and free its memory."""
        self._waiting.pop(id, None)
        if self._running.pop(id, None) is not None:
            self._memory.free(id)
        with self._changed:
            self._known.discard(id)

    def _refuse_bad(self, plan: StepPlan) -> None:
        """A floor is a promise: no plan breaks it, whatever the policy."""
        for id, budget in plan.budgets.items():
            generation = self._running[id].generation if id in self._running else self._waiting[id]
            if not generation.request.k_min <= budget <= self.limits.full_budget:
                raise RuntimeError(
                    f"the policy gave request {id} a budget of {budget}, allowed are {generation.request.k_min} to "
                    f"{self.limits.full_budget}"
                )

    def _admit(self, id: str, batch: int) -> None:
        generation = self._waiting[id]
        for move in self._memory.reserve(id, memory_of(generation.request)):
            moved = self._running[move.id]
            self._runner.memory.move(move.source, move.target, moved.prefilled + max(0, moved.generated - 1))
        self._running[id] = Active(self._waiting.pop(id), Sampler(generation.sampling), budget=batch)
        self._admitted += 1

    def _advance(self, parts: list[Part], budgets: Mapping[str, int], chosen: list[Chosen]) -> list[Event]:
        """Book what was computed."""
        now = self.clock()
        events: list[Event] = []
        drawn = iter(chosen)
        for part in parts:
            active, request = part.active, part.active.generation.request
            if active.in_prompt:
                active.prefilled += len(part.tokens)
            active.budget = budgets[request.id]
            if not part.drawn:
                continue
            token, logprob, top = next(drawn)
            if token is None:
                events += self._fail([request.id], "the model's logits are not finite")
                continue
            active.token = token
            active.generated += 1
            if active.first_token is None:
                active.first_token = now
            finished = None
            if token in active.generation.sampling.stop_token_ids:
                finished = "stop"
            elif active.generated == request.max_tokens:
                finished = "length"
            events.append(TokenEvent(request.id, token, active.budget, logprob, top, finished))
            if finished:
                self._end(request.id)
        return events

    def _fail(self, ids: list[str] | dict[str, None], error: Exception | str) -> list[Event]:
        """Answer requests with an error; the others go on."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        for id in list(ids):
            self._end(id)
        return [FailedEvent(id, text) for id in ids]

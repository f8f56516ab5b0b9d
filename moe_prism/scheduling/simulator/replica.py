"""One simulated engine: it carries out a policy's plans, and a step takes as long as the cost model says.

While neither a request comes nor one ends, steps repeat a plan; up to ``repeat`` of them are passed at once. With
``repeat`` 1 every step asks the policy, as an engine does. Knows nothing of other replicas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..cost_model import CostModel
from ..policies import Policy
from ..requests import Limits, Request, Running, State, StepPlan


@dataclass(frozen=True)
class Job:
    """A request and what its client will see: how many tokens it really generates, 1 .. max_tokens."""

    request: Request
    output_tokens: int


@dataclass
class Outcome:
    """What became of a request; times in seconds on the simulation's clock.

    Attributes:
        admitted, first_token, finished: NaN until they happen.
        tokens: generated so far.
        work: sum of the generated tokens' budgets.
        least: smallest budget it ran at.
        replica: which one served it.
    """

    job: Job
    replica: int
    admitted: float = math.nan
    first_token: float = math.nan
    finished: float = math.nan
    tokens: int = 0
    work: int = 0
    least: int = 1 << 30
    prefilled: int = field(default=0, repr=False)
    budget: int = field(default=0, repr=False)

    def running(self) -> Running:
        """As a policy sees it."""
        first = None if math.isnan(self.first_token) else self.first_token
        return Running(self.job.request, self.prefilled, self.tokens, first, self.budget)


class Replica:
    """Waiting and running requests, and the steps in progress."""

    def __init__(self, index: int, policy: Policy, cost: CostModel, limits: Limits, repeat: int) -> None:
        self.index, self.policy, self.cost, self.limits, self.repeat = index, policy, cost, limits, repeat
        self.waiting: dict[str, Outcome] = {}
        self.running: dict[str, Outcome] = {}
        self.ends = math.inf
        """When the steps in progress end, or an idle policy wants to be asked."""
        self.busy = 0.0
        self.steps = 0
        self._plan = StepPlan()
        self._began = self._each = 0.0
        self._count = 0

    def submit(self, job: Job, now: float) -> Outcome:
        """Take a request; steps in progress are cut after the one that is running now."""
        outcome = Outcome(job, self.index)
        self.waiting[job.request.id] = outcome
        if not self._count:
            self.ends = now
        elif self._each > 0:
            done = min(self._count, max(1, math.ceil((now - self._began) / self._each)))
            self._count, self.ends = done, self._began + done * self._each
        return outcome

    def advance(self, now: float) -> list[Outcome]:
        """Finish the steps that end now and start the next; returns the requests that ended."""
        ended = self._finish(now) if self._count else []
        self._start(now)
        return ended

    def _finish(self, now: float) -> list[Outcome]:
        plan, count = self._plan, self._count
        self.busy += count * self._each
        self.steps += count
        self._count = 0
        ended = []
        for name, k_active in plan.budgets.items():
            outcome = self.running[name]
            outcome.budget, outcome.least = k_active, min(outcome.least, k_active)
            if name in plan.prefill:
                outcome.prefilled += plan.prefill[name]
                if outcome.prefilled < outcome.job.request.prompt_tokens:
                    continue
            if not outcome.tokens:
                outcome.first_token = now if count == 1 else self._began + self._each
            outcome.tokens += count
            outcome.work += count * k_active
            if outcome.tokens >= outcome.job.output_tokens:
                outcome.finished = now
                ended.append(outcome)
                del self.running[name]
        return ended

    def _start(self, now: float) -> None:
        self.ends = math.inf
        if not self.waiting and not self.running:
            return
        state = State(
            [o.job.request for o in self.waiting.values()], [o.running() for o in self.running.values()], self.limits
        )
        plan = self.policy.plan(state, now)
        for name in plan.admit:
            outcome = self.waiting.pop(name)
            outcome.admitted = now
            self.running[name] = outcome
        if not plan.budgets:
            self.ends = math.inf if plan.wake is None else max(plan.wake, now)
            return
        decoding = [name for name in plan.budgets if name not in plan.prefill]
        context = sum(self.running[name].job.request.prompt_tokens + self.running[name].tokens for name in decoding)
        load = self.cost.load(
            [plan.budgets[name] for name in decoding],
            float(context),
            list(plan.prefill.values()),
            [plan.budgets[name] for name in plan.prefill],
        )
        count = 1
        if not plan.prefill:
            left = min(self.running[name].job.output_tokens - self.running[name].tokens for name in decoding)
            count = max(1, min(self.repeat, left))
        self._plan, self._count, self._began, self._each = plan, count, now, self.cost.seconds(load)
        self.ends = now + count * self._each

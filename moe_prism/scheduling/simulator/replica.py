"""One simulated engine: it carries out a policy's plans, and a step takes as long as the cost model says.

While neither a request comes nor one ends, steps repeat a plan; up to ``repeat`` of them are passed at once. With
``repeat`` 1 every step asks the policy, as an engine does. Knows nothing of other replicas.
"""

from __future__ import annotations

import math

from ..cost_model import CostModel
from ..outcomes import Outcome
from ..policies import Policy
from ..requests import Limits, State, StepPlan


class Replica:
    """Waiting and running requests, and the steps in progress.

    Attributes:
        ends: when the steps in progress end, or when an idle policy wants to be asked.
        busy: seconds spent in steps.
        steps: how many ended.
    """

    def __init__(self, index: int, policy: Policy, cost: CostModel, limits: Limits, repeat: int) -> None:
        self.index, self.policy, self.cost, self.limits, self.repeat = index, policy, cost, limits, repeat
        self.waiting: dict[str, Outcome] = {}
        self.running: dict[str, Outcome] = {}
        self.ends = math.inf
        self.busy = 0.0
        self.steps = 0
        self._plan = StepPlan()
        self._began = self._each = 0.0
        self._count = self._admitted = 0

    def submit(self, outcome: Outcome, now: float) -> None:
        """Take a request; repeated steps are cut after the one that is running now."""
        self.waiting[outcome.job.request.id] = outcome
        if not self._count:
            self.ends = now
        elif self._count > 1:
            self._count = min(self._count, max(1, math.ceil((now - self._began) / self._each)))
            self.ends = self._began + self._count * self._each

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
            if name in plan.prefill:
                outcome.prefill(plan.prefill[name], k_active)
                if outcome.prefilled < outcome.job.request.prompt_tokens:
                    continue
            outcome.generate(k_active, now, count)
            if outcome.tokens >= outcome.job.output_tokens:
                outcome.finished = now
                ended.append(outcome)
                del self.running[name]
        return ended

    def _start(self, now: float) -> None:
        self.ends = math.inf
        if not self.waiting and not self.running:
            return
        waiting = [outcome.job.request for outcome in self.waiting.values()]
        running = [outcome.running() for outcome in self.running.values()]
        state = State(waiting, running, self.limits, self._admitted)
        plan = self.policy.plan(state, now)
        for name in plan.admit:
            outcome = self.waiting.pop(name)
            outcome.admitted = now
            outcome.budget = plan.batch
            self.running[name] = outcome
        self._admitted += len(plan.admit)
        if not plan.budgets:
            if plan.wake is not None and plan.wake <= now:
                raise RuntimeError(f"a policy that does nothing must wake after now = {now}, not at {plan.wake}")
            self.ends = math.inf if plan.wake is None else plan.wake
            return
        decoding = [name for name in plan.budgets if name not in plan.prefill]
        context = sum(self.running[name].job.request.prompt_tokens + self.running[name].tokens for name in decoding)
        load = self.cost.load(
            [plan.budgets[name] for name in decoding],
            float(context),
            list(plan.prefill.values()),
            [plan.budgets[name] for name in plan.prefill],
            [self.running[name].prefilled for name in plan.prefill],
            plan.cap,
        )
        count = 1
        if not plan.prefill:
            left = min(self.running[name].job.output_tokens - self.running[name].tokens for name in decoding)
            count = min(self.repeat, left)
        self._plan, self._count, self._began, self._each = plan, count, now, self.cost.seconds(load)
        self.ends = now + count * self._each

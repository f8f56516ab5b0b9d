"""What scheduling tests are made of: a made-up cost model, random workloads, and a policy that is watched."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from moe_prism.scheduling import Admission, CostModel, Job, Limits, Outcome, Policy, Request, State, StepLoad, StepPlan
from moe_prism.scheduling.requests import memory_of
from moe_prism.scheduling.simulator import Simulation, simulate
from moe_prism.scheduling.step_load import TERMS

FULL, SUB_EXPERTS = 8, 64
# seconds; the gate and the rest of a step cost something, as they do in engines
SECONDS = {
    "step": 5e-3,
    "several": 2e-4,
    "prefill_step": 3e-3,
    "decode_step": 2e-3,
    "prefill_tokens": 5e-5,
    "prefill_first": 1e-5,
    "prefill_low": 2e-5,
    "prefill_work": 3e-4,
    "prefill_context": 1e-8,
    "decode_tokens": 1e-4,
    "decode_low": 2e-4,
    "decode_work": 2e-3,
    "touched": 1e-2,
    "context": 1e-7,
    "gated": 5e-4,
    "gated_tokens": 1e-5,
}
BATCHES = ("fifo", "fifo-original", "full-batch", "virtual-queues")
ORIGINAL = ("fifo-original", "system-only")  # these run the original model, which has one budget


def cost_model(full_budget: int = FULL, sub_experts: int = SUB_EXPERTS, **changes: float) -> CostModel:
    seconds = SECONDS | changes
    return CostModel(tuple(seconds[name] for name in TERMS), full_budget, sub_experts)


def request(name: str = "a", **changes: Any) -> Request:
    fields: dict[str, Any] = {"arrival": 0.0, "prompt_tokens": 20, "max_tokens": 10, "k_min": 2, "k_active": FULL}
    return Request(name, **(fields | changes))


@st.composite
def workloads(draw: st.DrawFn, most: int = 12) -> tuple[list[Job], Limits]:
    count = draw(st.integers(1, most))
    limits = Limits(
        FULL,
        max_running=draw(st.integers(1, 6)),
        memory_tokens=draw(st.sampled_from([None, 150, 400])),
        max_prefill=draw(st.sampled_from([None, 16, 64])),
    )
    jobs, now = [], draw(st.floats(0, 5))
    for i in range(count):
        now += draw(st.sampled_from([0.0, 0.001, 0.05, 0.4, 20.0]))
        floor = draw(st.integers(1, FULL))
        most_tokens = draw(st.integers(1, 40))
        asked = Request(
            f"r{i}",
            now,
            draw(st.integers(1, 100)),
            most_tokens,
            floor,
            draw(st.integers(floor, FULL)),
            draw(st.sampled_from([None, 5.0, 100.0, 1000.0])),
            draw(st.sampled_from([None, 1.0, 30.0, 200.0])),
            draw(st.integers(-1, 1)),
        )
        jobs.append(Job(asked, draw(st.integers(1, most_tokens))))
    return jobs, limits


@dataclass(frozen=True)
class Watched(Policy):
    """Passes every plan on and checks it against what its state allows.

    Attributes:
        seen: (state, time, plan) of every call.
    """

    inner: Policy
    seen: list[tuple[State, float, StepPlan]] = field(default_factory=list)

    def plan(self, state: State, now: float) -> StepPlan:
        plan = self.inner.plan(state, now)
        assert plan == self.inner.plan(state, now)  # the same inputs, the same plan
        self.seen.append((state, now, plan))
        check_plan(state, plan)
        return plan


def check_plan(state: State, plan: StepPlan) -> None:
    waiting = {r.id: r for r in state.waiting}
    running = {r.request.id: r for r in state.running}
    limits = state.limits
    assert len(set(plan.admit)) == len(plan.admit)
    assert set(plan.admit) <= set(waiting)
    after = [*(r.request for r in state.running), *(waiting[name] for name in plan.admit)]
    assert len(after) <= limits.max_running
    assert limits.memory_tokens is None or sum(map(memory_of, after)) <= limits.memory_tokens
    left = {r.id: r.prompt_tokens - (running[r.id].prefilled if r.id in running else 0) for r in after}
    assert set(plan.prefill) <= set(plan.budgets) <= set(left)
    for name, tokens in plan.prefill.items():
        assert isinstance(tokens, int)
        assert 1 <= tokens <= left[name]
    assert limits.max_prefill is None or sum(plan.prefill.values()) <= limits.max_prefill
    # who has prompt tokens left computes some of them or does not take part
    assert all((name in plan.prefill) == (left[name] > 0) for name in plan.budgets)
    for asked in after:
        if asked.id in plan.budgets:
            assert isinstance(plan.budgets[asked.id], int)
            assert asked.k_min <= plan.budgets[asked.id] <= limits.full_budget
    assert plan.budgets or not after  # an engine with requests does something
    assert plan.cap is None or plan.cap >= 1


def run(
    jobs: list[Job],
    policy: Policy,
    limits: Limits,
    *,
    cost: CostModel | None = None,
    hopeless: str = "serve",
    **options: Any,
) -> Simulation:
    cost = cost or cost_model()
    return simulate(jobs, policy, cost, Admission(cost, limits, hopeless), **options)  # type: ignore[arg-type]


def ended(outcome: Outcome) -> bool:
    return not math.isnan(outcome.finished)


def steps(rng: np.random.Generator, count: int) -> list[StepLoad]:
    cost = cost_model()
    found = []
    for _ in range(count):
        decode = rng.integers(1, FULL + 1, rng.integers(0, 20)).tolist()
        prompts = rng.integers(1, 200, rng.integers(0 if decode else 1, 4))
        ks = rng.integers(1, FULL + 1, len(prompts))
        starts = rng.integers(0, 300, len(prompts))
        if rng.random() < 0.1:  # a single token
            decode, prompts, ks, starts = [int(rng.integers(1, FULL + 1))], prompts[:0], ks[:0], starts[:0]
        if rng.random() < 0.3:
            decode, ks = [FULL] * len(decode), np.full(len(prompts), FULL)
        found.append(cost.load(decode, float(len(decode) * rng.integers(1, 500)), prompts, ks, starts))
    return found

"""The simulator against runs worked out by hand, and against itself step by step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling_samples import FULL, SUB_EXPERTS, cost_model, request, run, workloads

from moe_prism.errors import PrismError
from moe_prism.scheduling import POLICIES, Admission, CostModel, Job, Limits, Outcome, Policy, Request, State, StepPlan
from moe_prism.scheduling.simulator import Router, simulate
from moe_prism.scheduling.step_load import TERMS

COST = cost_model()
LIMITS = Limits(FULL, 8)
ADMISSION = Admission(COST, LIMITS)
# 1 s a step, and 0.1 s for a prompt token: easy to follow by hand
PLAIN = CostModel(tuple({"step": 1.0, "prefill_tokens": 0.1}.get(term, 0.0) for term in TERMS), FULL, SUB_EXPERTS)


def policy(name: str, cost: CostModel = COST, **options: float) -> Policy:
    return POLICIES.create(name, {"cost": cost, **options})


def test_two_batches_by_hand() -> None:
    jobs = [
        Job(request("a", arrival=1.0, prompt_tokens=10, k_min=2), 3),
        Job(request("b", arrival=1.5, prompt_tokens=20, k_min=5), 1),
        Job(request("c", arrival=2.0, prompt_tokens=10, k_min=3), 2),
    ]
    found = run(jobs, policy("fifo", PLAIN), LIMITS, cost=PLAIN)
    a, b, c = found.outcomes
    # a alone: its prompt takes 1 + 1, two more tokens 1 each; then b and c at 5: 1 + 3, then c's second token
    assert (a.admitted, a.first_token, a.finished) == pytest.approx((1.0, 3.0, 5.0))
    assert (b.admitted, b.first_token, b.finished) == pytest.approx((5.0, 9.0, 9.0))
    assert (c.admitted, c.first_token, c.finished) == pytest.approx((5.0, 9.0, 10.0))
    assert (a.token_budgets, b.token_budgets, c.token_budgets) == ({2: 3}, {5: 1}, {5: 2})
    assert (a.prompt_budgets, c.prompt_budgets) == ({2: 10}, {5: 10})
    assert found.seconds == pytest.approx(9.0)
    assert (found.busy, found.steps) == (pytest.approx(1.0), 5)


def test_a_policy_that_waits_is_woken_when_it_wants_to_be() -> None:
    found = run([Job(request(arrival=3.0), 1)], policy("full-batch", max_wait=4.0), LIMITS)
    assert found.outcomes[0].admitted == 7.0


@pytest.mark.parametrize("name", ["fifo", "continuous"])
@settings(max_examples=25, deadline=None)
@given(workload=workloads())
def test_repeated_steps_are_the_same_steps_for_a_policy_that_would_not_change_its_mind(name: str, workload) -> None:
    jobs, limits = workload
    jobs = [Job(replace(j.request, ttft_ms=1e9, tpot_ms=1e9), j.output_tokens) for j in jobs]
    options = {"patience": 1e9, "ttft_ms": 1e9, "tpot_ms": 1e9} if name == "continuous" else {}
    flat = cost_model(context=0.0)  # else a step gets longer with every token, and repeated ones do not
    exact = run(jobs, policy(name, flat, **options), limits, cost=flat, repeat=1)
    quick = run(jobs, policy(name, flat, **options), limits, cost=flat, repeat=64)
    assert quick.steps == exact.steps or name == "continuous"
    for a, b in zip(exact.outcomes, quick.outcomes, strict=True):
        assert a.tokens == b.tokens
        if name == "fifo":
            assert (a.first_token, a.finished) == pytest.approx((b.first_token, b.finished))
            assert a.token_budgets == b.token_budgets


def test_a_request_that_comes_cuts_repeated_steps() -> None:
    jobs = [Job(request("a", prompt_tokens=10, max_tokens=50), 50), Job(request("b", arrival=5.5, prompt_tokens=10), 1)]
    found = run(jobs, policy("continuous", PLAIN, tpot_ms=1e7), LIMITS, cost=PLAIN, repeat=1000)
    # a's prompt ends at 2; steps of 1 s follow; b starts after the one from 5 to 6
    assert found.outcomes[1].admitted == pytest.approx(6.0)


@dataclass(frozen=True)
class Loses(Policy):
    def plan(self, state: State, now: float) -> StepPlan:
        return StepPlan()


@dataclass(frozen=True)
class Sleeps(Policy):
    def plan(self, state: State, now: float) -> StepPlan:
        return StepPlan(wake=now)


def test_policies_that_lose_requests_or_stand_still_are_found_out() -> None:
    with pytest.raises(RuntimeError, match="the policy lost them"):
        run([Job(request(), 1)], Loses(COST), LIMITS)
    with pytest.raises(RuntimeError, match="must wake after now"):
        run([Job(request(), 1)], Sleeps(COST), LIMITS)


def test_a_wrong_cost_model_misleads_the_policy_but_not_the_clock() -> None:
    slow = cost_model(step=0.2)
    found = simulate([Job(request(tpot_ms=100.0, ttft_ms=900.0), 5)], policy("continuous"), slow, ADMISSION).outcomes[0]
    assert found.prompt_budgets == {FULL: 20}  # it believes that there is time
    assert not found.job.request.best_effort
    assert found.finished > 1.0


@pytest.mark.parametrize(
    ("jobs", "message"),
    [
        ([Job(request(), 11)], "output_tokens must be from 1 to max_tokens = 10, got 11"),
        ([Job(request(), 0)], "got 0"),
        ([Job(request(), 1), Job(request(), 1)], "'a' is used twice"),
        ([Job(request(arrival=2.0), 1), Job(request("b", arrival=1.0), 1)], "request b: arrival 1.0 is before"),
        ([Job(request(k_min=9, k_active=9), 1)], "k_min must be from 1 to 8"),
    ],
)
def test_bad_jobs_are_refused_before_anything_runs(jobs, message) -> None:
    with pytest.raises(PrismError, match=message):
        run(jobs, policy("fifo"), LIMITS)
    with pytest.raises(PrismError, match="replicas and repeat must be 1 or more, got 0 and 1"):
        run([], policy("fifo"), LIMITS, replicas=0)


def test_no_jobs_no_time() -> None:
    found = run([], policy("fifo"), LIMITS)
    assert (found.outcomes, found.seconds, found.busy, found.steps) == ([], 0.0, 0.0, 0)


def test_replicas_share_the_work() -> None:
    jobs = [Job(request(f"r{i}", arrival=i * 0.001, prompt_tokens=50, k_active=2), 10) for i in range(64)]
    one, four = (run(jobs, policy("continuous"), LIMITS, replicas=n) for n in (1, 4))
    assert {o.replica for o in four.outcomes} == {0, 1, 2, 3}
    assert four.seconds < one.seconds / 3
    assert max(np.bincount([o.replica for o in four.outcomes])) == 16


works = st.lists(st.tuples(st.integers(1, FULL), st.integers(1, 200), st.integers(0, 5)), min_size=1, max_size=40)


@settings(max_examples=60)
@given(works=works, replicas=st.integers(1, 5), lanes=st.sampled_from([None, (FULL,), (3, FULL), (2, 5, 6)]))
def test_the_router_takes_the_least_loaded_of_the_lane(works, replicas: int, lanes) -> None:
    if lanes is not None and len(lanes) > replicas:
        with pytest.raises(PrismError, match="at most one per replica"):
            Router(replicas, lanes, COST, LIMITS)
        return
    router = Router(replicas, lanes, COST, LIMITS)
    left = np.zeros(replicas)
    running: list[Outcome] = []
    count = len(lanes or (0,))
    for k_min, prompt, ends in works:
        asked = request(prompt_tokens=prompt, k_min=k_min)
        lane = next((i for i, top in enumerate(lanes) if k_min <= top), count - 1) if lanes else 0
        members = [i for i in range(replicas) if i % count == lane]
        work = COST.prefill_seconds(prompt, k_min, prompt) + 10 * COST.table(8, k_min) / 8
        chosen = router.choose(asked)
        assert chosen in members
        assert left[chosen] == pytest.approx(min(left[members]), abs=1e-9)
        left[chosen] += work
        running.append(Outcome(Job(asked, 1), chosen))
        for _ in range(min(ends, len(running))):
            done = running.pop(0)
            router.finished(done)
            k, tokens = done.job.request.k_min, done.job.request.prompt_tokens
            left[done.replica] -= COST.prefill_seconds(tokens, k, tokens) + 10 * COST.table(8, k) / 8


@pytest.mark.parametrize("lanes", [(5, 3), (3, 3)])
def test_lanes_must_ascend(lanes) -> None:
    with pytest.raises(PrismError, match="lanes must be ascending floors"):
        Router(4, lanes, COST, LIMITS)


def test_floors_have_their_lanes() -> None:
    jobs = [Job(Request(f"r{i}", 0.0, 20, 5, 1 + i % FULL, FULL), 5) for i in range(40)]
    found = run(jobs, policy("fifo"), LIMITS, replicas=4, lanes=(4, FULL))
    for outcome in found.outcomes:
        assert outcome.replica % 2 == (outcome.job.request.k_min > 4)

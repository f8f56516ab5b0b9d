"""What holds of every policy, on random workloads."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from scheduling_samples import BATCHES, FULL, ORIGINAL, Watched, cost_model, ended, run, workloads

from moe_prism.errors import PrismError
from moe_prism.scheduling import POLICIES, Request
from moe_prism.scheduling.policies.ablation import ABLATION
from moe_prism.scheduling.requests import memory_of

EVERY = sorted(POLICIES)


def watched(name: str, **options: object) -> Watched:
    cost = cost_model()
    return Watched(cost, POLICIES.create(name, {"cost": cost, **options}))


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in EVERY), ("continuous", {"capped": True})])
@settings(max_examples=30, deadline=None)
@given(workload=workloads())
def test_floors_limits_and_every_request_served_once(name: str, options: dict, workload) -> None:
    jobs, limits = workload
    policy = watched(name, **options)
    found = run(jobs, policy, limits)  # every plan is checked: see check_plan
    admitted = [admit for _, _, plan in policy.seen for admit in plan.admit]
    assert sorted(admitted) == sorted(job.request.id for job in jobs)  # nobody lost, nobody twice
    for outcome in found.outcomes:
        asked = outcome.job.request
        assert ended(outcome)
        assert outcome.tokens == outcome.job.output_tokens == sum(outcome.token_budgets.values())
        assert outcome.prefilled == asked.prompt_tokens == sum(outcome.prompt_budgets.values())
        assert asked.arrival <= outcome.admitted < outcome.first_token <= outcome.finished
        budgets = {*outcome.prompt_budgets, *outcome.token_budgets}
        assert min(budgets) == outcome.least >= asked.k_min
        assert max(budgets) <= (FULL if name in ORIGINAL else asked.k_active)
        if name in ORIGINAL:
            assert budgets == {FULL}


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=20, deadline=None)
@given(workload=workloads())
def test_work_is_conserved(name: str, workload) -> None:
    jobs, limits = workload
    policy = watched(name)
    run(jobs, policy, limits)
    for state, now, plan in policy.seen:
        if plan.budgets:
            assert plan.wake is None
            continue
        assert not state.running
        if state.waiting:  # idle although somebody could start: only the one that waits for its batch
            assert name == "full-batch"
            assert now < plan.wake <= min(r.arrival for r in state.waiting) + policy.inner.max_wait
            assert len(state.waiting) < limits.max_running
            assert sum(map(memory_of, state.waiting)) <= (limits.memory_tokens or 1 << 60)


@pytest.mark.parametrize("name", BATCHES)
@settings(max_examples=20, deadline=None)
@given(workload=workloads())
def test_a_batch_stays_together_at_one_budget(name: str, workload) -> None:
    jobs, limits = workload
    jobs = [replace(job, request=replace(job.request, k_active=FULL)) for job in jobs]  # as in the paper
    policy = watched(name)
    run([replace(j, request=replace(j.request, ttft_ms=None, tpot_ms=None)) for j in jobs], policy, limits)
    batch: set[int] = set()
    members: list[Request] = []
    for state, _, plan in policy.seen:
        if plan.admit:
            assert not state.running
            batch, members = set(), [r for r in state.waiting if r.id in plan.admit]
        batch |= set(plan.budgets.values())
        assert len(batch) <= 1
        if batch and name in ("fifo", "full-batch"):
            assert batch == {max(r.k_min for r in members)}


def test_the_ablation_names_registered_policies() -> None:
    assert set(ABLATION.values()) <= set(EVERY)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("full-batch", "max_wait"),
        ("virtual-queues", "t_max"),
        *(("continuous", option) for option in ("ttft_ms", "tpot_ms", "margin", "patience", "calm", "rise", "piece")),
    ],
)
def test_options_must_be_positive(name: str, option: str) -> None:
    with pytest.raises(PrismError, match=rf"{option} must be above 0, got 0"):
        POLICIES.create(name, {"cost": cost_model(), option: 0})


def test_unknown_names_and_options() -> None:
    with pytest.raises(PrismError, match="unknown policy 'best'; known: continuous, fifo"):
        POLICIES.create("best", {"cost": cost_model()})
    with pytest.raises(PrismError, match="has no option 'paitence'"):
        POLICIES.create("continuous", {"cost": cost_model(), "paitence": 1})

"""Our policy: objectives, excess, priorities, the bound on waiting, and budgets that stay."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling_samples import FULL, Watched, cost_model, request, run, workloads

from moe_prism.scheduling import POLICIES, Job, Limits, Request, Running, State
from moe_prism.scheduling.policies.continuous import Continuous
from moe_prism.scheduling.policies.queue import in_turn
from moe_prism.scheduling.requests import memory_of
from moe_prism.scheduling.summary import met, tpot, ttft

COST = cost_model()
LIMITS = Limits(FULL, 8)


def decoding(name: str = "a", generated: int = 5, now: float = 1.0, budget: int = 0, **asked: object) -> Running:
    """On schedule: its next token is due exactly one objective from now."""
    wanted = request(name, **{"tpot_ms": 50.0, "prompt_tokens": 20, **asked})
    first = now - (generated - 1) * (wanted.tpot_ms or 100.0) / 1e3
    return Running(wanted, wanted.prompt_tokens, generated, first, budget)


def step_seconds(state: State, plan, cost=COST) -> float:
    running = {r.request.id: r for r in state.running}
    names = [name for name in plan.budgets if name not in plan.prefill]
    context = sum(running[n].request.prompt_tokens + running[n].generated for n in names)
    starts = [running[n].prefilled if n in running else 0 for n in plan.prefill]
    of_prompts = [plan.budgets[n] for n in plan.prefill]
    budgets = [plan.budgets[n] for n in names]
    return cost.seconds(cost.load(budgets, context, list(plan.prefill.values()), of_prompts, starts, plan.cap))


groups = st.lists(
    st.tuples(st.integers(1, FULL), st.integers(0, FULL), st.sampled_from([None, 15.0, 25.0, 40.0, 80.0])),
    min_size=1,
    max_size=6,
)


@settings(max_examples=200, deadline=None)
@given(floors=groups)
def test_decoding_gets_the_largest_excess_that_keeps_the_pace(floors) -> None:
    running = [
        decoding(f"r{i}", k_min=floor, k_active=max(floor, most), tpot_ms=tpot_ms)
        for i, (floor, most, tpot_ms) in enumerate(floors)
    ]
    state = State([], running, LIMITS)
    policy = Continuous(COST)
    plan = policy.plan(state, 1.0)
    limit = policy.margin * min((r.request.tpot_ms or policy.tpot_ms) / 1e3 for r in running)
    best, tried = None, []
    for excess in range(FULL):  # try everything
        budgets = [min(r.request.k_active, r.request.k_min + excess) for r in running]
        seconds = COST.seconds(COST.load(budgets, sum(r.request.prompt_tokens + r.generated for r in running)))
        tried.append((seconds, budgets))
        if seconds <= limit:
            best = budgets
    fastest = min(seconds for seconds, _ in tried)
    as_good = [budgets for seconds, budgets in tried if seconds <= 1.01 * fastest + 1e-12]
    assert list(plan.budgets.values()) == (best or as_good[-1])


@pytest.mark.parametrize(("work", "floors"), [(0.0, False), (2e-3, True)])
def test_quality_is_given_up_under_load_only_where_that_buys_time(work: float, floors: bool) -> None:
    cost = cost_model(decode_work=work, touched=5 * work, prefill_work=work / 10, gated=0.0, gated_tokens=0.0)
    running = [decoding(f"r{i}", k_min=2, tpot_ms=80.0) for i in range(8)]
    waiting = [request(f"w{i}", k_min=2) for i in range(20)]  # no place is free for any of them
    budgets = Continuous(cost).plan(State(waiting, running, LIMITS), 1.0).budgets
    assert set(budgets.values()) == ({2} if floors else {FULL})


def test_scarce_time_is_taken_from_those_farthest_above_their_floors() -> None:
    running = [decoding("low", k_min=1, tpot_ms=13.5), decoding("high", k_min=5, tpot_ms=13.5)]
    budgets = Continuous(COST).plan(State([], running, LIMITS), 1.0).budgets
    assert 1 < budgets["low"] < FULL
    assert budgets["high"] == min(FULL, 5 + budgets["low"] - 1)
    alone = Continuous(COST).plan(State([], running[:1], LIMITS), 1.0).budgets
    assert alone["low"] > budgets["low"]


def test_spare_time_goes_to_quality_for_prompts_and_tokens() -> None:
    state = State([request("new", arrival=1.0)], [decoding("old", k_min=1, tpot_ms=500.0)], LIMITS)
    plan = Continuous(COST).plan(state, 1.0)
    assert plan.budgets == {"old": FULL, "new": FULL}
    assert plan.prefill == {"new": 20}


def test_a_line_of_prompts_lowers_prompts_until_all_are_in_time() -> None:
    line = [request(f"r{i}", arrival=1.0, prompt_tokens=400, k_min=1, ttft_ms=550.0) for i in range(4)]
    policy = Continuous(COST)
    plan = policy.plan(State(line, [], LIMITS), 1.0)
    (k_active,) = set(plan.budgets.values())

    def ends(k: int) -> float:
        return sum(COST.seconds(COST.load((), 0, [400], [k])) for _ in line) - 3 * COST.step_overhead(prompts=True)

    assert 1 < k_active < FULL
    assert ends(k_active) <= policy.margin * 0.55 < ends(k_active + 1)
    assert policy.plan(State(line[:1], [], LIMITS), 1.0).budgets == {"r0": FULL}


def test_prompts_share_the_step_with_decoding_and_keep_its_pace() -> None:
    state = State([request("new", arrival=1.0, prompt_tokens=1000)], [decoding("old", tpot_ms=50.0)], LIMITS)
    plan = Continuous(COST).plan(state, 1.0)
    assert 32 <= plan.prefill["new"] < 1000
    assert step_seconds(state, plan) <= 0.9 * 0.05 + 1e-9
    ahead = State(state.waiting, [decoding("old", tpot_ms=50.0, now=1.2)], LIMITS)  # 200 ms ahead of its schedule
    lent = Continuous(COST).plan(ahead, 1.0)
    assert lent.prefill["new"] > plan.prefill["new"]
    assert step_seconds(ahead, lent) <= 0.9 * 0.1 + 1e-9


@settings(max_examples=25, deadline=None)
@given(workload=workloads())
def test_begun_prompts_get_on_in_every_step(workload) -> None:
    jobs, limits = workload
    policy = Watched(COST, Continuous(COST))
    run(jobs, policy, limits)
    for state, _, plan in policy.seen:
        begun = [r for r in state.running if r.prefill_left]
        if begun:
            assert sum(plan.prefill.values()) >= min(32, limits.max_prefill or 32, sum(r.prefill_left for r in begun))


@settings(max_examples=25, deadline=None)
@given(workload=workloads())
def test_priorities_decide_who_starts(workload) -> None:
    jobs, limits = workload
    policy = Watched(COST, Continuous(COST))
    run(jobs, policy, limits)
    for state, now, plan in policy.seen:
        admitted = [r for r in state.waiting if r.id in plan.admit]
        if any(now - r.arrival >= policy.inner.patience for r in state.waiting):
            continue  # others have their turn
        memory = limits.memory_tokens or 1 << 60
        left = memory - sum(memory_of(r) for r in [*(r.request for r in state.running), *admitted])
        for r, other in itertools.product(admitted, state.waiting):
            if other.id not in plan.admit and other.priority < r.priority:
                assert memory_of(other) > left  # it is overtaken only because it does not fit


@settings(max_examples=25, deadline=None)
@given(workload=workloads(20), patience=st.sampled_from([0.05, 0.5]))
def test_nobody_waits_longer_than_the_stated_bound(workload, patience: float) -> None:
    jobs, limits = workload
    policy = Watched(COST, Continuous(COST, patience=patience))
    run(jobs, policy, limits)
    ahead: dict[str, int] = {}  # those late before it, when it became late
    others: dict[str, int] = {}
    for state, now, plan in policy.seen:
        late = [r for r in state.waiting if now - r.arrival >= patience]
        for i, r in enumerate(late):
            ahead.setdefault(r.id, i)
            others.setdefault(r.id, 0)
        starting = list(plan.admit)
        for r in late:
            before = starting.index(r.id) if r.id in starting else len(starting)
            others[r.id] += before
            assert others[r.id] <= 2 * ahead[r.id] + 1


def test_a_flood_of_urgent_requests_does_not_starve_the_last() -> None:
    poor = Request("poor", 0.05, 50, 5, 2, FULL, priority=9)
    flood = [Job(Request(f"f{i}", i * 0.1, 50, 30, 2, FULL, priority=0), 30) for i in range(100)]
    jobs = [flood[0], Job(poor, 5), *flood[1:]]
    patient = run(jobs, Continuous(COST, patience=2.0), Limits(FULL, 1)).outcomes[1]
    forever = run(jobs, Continuous(COST, patience=1e9), Limits(FULL, 1)).outcomes[1]
    assert patient.admitted < 2.0 + 30 * 0.1  # the place is taken for one request's time at most
    assert forever.admitted > 12.0


def test_a_late_request_that_needs_much_memory_is_not_overtaken_when_it_is_its_turn() -> None:
    running = [decoding("a", max_tokens=40)]
    waiting = [request("large", arrival=0.0, prompt_tokens=80), request("small", arrival=50.0)]
    limits = Limits(FULL, 8, memory_tokens=140)  # 60 are taken, 90 and 30 wanted
    policy = Continuous(COST)
    assert policy.plan(State(waiting, running, limits, 0), 5.0).admit == ("small",)
    assert policy.plan(State(waiting, running, limits, 0), 55.0).admit == ()
    assert policy.plan(State(waiting, running, limits, 1), 55.0).admit == ("small",)
    # on another's turn it is overtaken by that one, not by all that fit
    waiting.append(request("smaller", arrival=50.0, prompt_tokens=5))
    assert len(policy.plan(State(waiting, running, limits, 1), 55.0).admit) == 1


@pytest.mark.parametrize(("work", "kept"), [(0.0, True), (1e-3, False)])
def test_a_crowd_takes_a_prompts_budget_only_where_that_saves_time(work: float, kept: bool) -> None:
    cost = cost_model(prefill_work=work)
    waiting = [request(f"r{i}", k_min=1, k_active=FULL, prompt_tokens=64) for i in range(40)]
    plan = Continuous(cost, ttft_ms=1e6).plan(State(waiting, [], LIMITS), 0.0)
    assert {plan.budgets[name] == FULL for name in plan.prefill} == {kept}


@given(st.data())
def test_those_who_are_late_take_turns(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 10))
    arrival = np.array(data.draw(st.lists(st.floats(0, 9), min_size=count, max_size=count)))
    late = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    regular = np.array(data.draw(st.permutations(range(count))), dtype=np.intp)
    admitted = data.draw(st.integers(0, 3))
    order = in_turn(regular, arrival, late, admitted).tolist()
    assert sorted(order) == list(range(count))
    assert [i for i in order if not late[i]] == [i for i in regular.tolist() if not late[i]]
    waited = [arrival[i] for i in order if late[i]]
    assert waited == sorted(waited)
    for place in range(min(2 * int(late.sum()), 2 * int((~late).sum()))):
        assert late[order[place]] == (place % 2 == admitted % 2)


def test_budgets_do_not_flap_under_a_steady_load() -> None:
    rng = np.random.default_rng(0)
    lengths = [(int(p), int(o)) for p, o in zip(rng.integers(20, 200, 300), rng.integers(20, 60, 300), strict=True)]
    jobs = [
        Job(Request(f"r{i}", i * 0.11, prompt, out, int(rng.integers(1, 5)), FULL, 1000.0, 60.0), out)
        for i, (prompt, out) in enumerate(lengths)
    ]
    policy = Watched(COST, Continuous(COST))
    found = run(jobs, policy, Limits(FULL, 16))
    seen: dict[str, list[int]] = {}
    for _, _, plan in policy.seen:
        for name, k in plan.budgets.items():
            if name not in plan.prefill:
                seen.setdefault(name, []).append(k)
    changes = [sum(a != b for a, b in itertools.pairwise(budgets)) for budgets in seen.values()]
    turns = [sum((a - b) * (b - c) < 0 for a, b, c in zip(x, x[1:], x[2:], strict=False)) for x in seen.values()]
    tokens = sum(map(len, seen.values()))
    assert all(map(met, found.outcomes))
    assert sum(changes) <= 0.2 * tokens
    assert sum(turns) <= 0.005 * tokens  # a request's budget goes one way, not up and down
    assert 2 < np.mean([k for budgets in seen.values() for k in budgets]) < FULL  # a load that does need adjusting


def test_an_excess_falls_at_once_and_rises_slowly_where_there_is_room() -> None:
    slow = [decoding(f"r{i}", k_min=1, tpot_ms=13.0, budget=FULL) for i in range(2)]
    fallen = Continuous(COST).plan(State([], slow, LIMITS), 1.0).budgets["r0"]
    assert fallen < FULL
    relaxed = [decoding("r0", k_min=1, tpot_ms=500.0, budget=fallen)]
    policy = Continuous(COST, rise=1 / FULL)
    assert policy.plan(State([], relaxed, LIMITS), 1.0).budgets["r0"] == fallen + 1
    exact = COST.table(1, fallen + 1, 25.0) / 0.9 * 1e3 * 1.01  # fits, but with no room to spare
    tight = [decoding("r0", k_min=1, tpot_ms=exact, budget=fallen)]
    assert policy.plan(State([], tight, LIMITS), 1.0).budgets["r0"] == fallen


def test_at_low_load_everything_runs_at_full_budget() -> None:
    jobs = [Job(Request(f"r{i}", i * 2.0, 100, 20, 1, FULL, 1000.0, 100.0), 20) for i in range(20)]
    for outcome in run(jobs, Continuous(COST), LIMITS).outcomes:
        assert outcome.least == FULL
        assert met(outcome)


@pytest.mark.parametrize("by_memory", [False, True])
def test_excess_falls_as_room_runs_out(by_memory: bool) -> None:
    limits = Limits(FULL, 100, memory_tokens=8 * 30) if by_memory else Limits(FULL, 8)
    given = []
    for count in range(1, 13):
        running = [decoding(f"r{i}", tpot_ms=500.0) for i in range(min(count, 8))]
        waiting = [request(f"w{i}", arrival=1.0) for i in range(count - len(running))]
        (k_active,) = set(Continuous(COST).plan(State(waiting, running, limits), 1.0).budgets.values())
        given.append(k_active)
    assert given[:6] == [FULL] * 6  # three quarters of it are taken
    assert given == sorted(given, reverse=True)
    assert 2 < given[7] < FULL  # all of it
    assert given[9:] == [2, 2, 2]  # a quarter more would like to run


def test_the_only_place_is_not_scarce_until_somebody_waits_for_it() -> None:
    alone = State([], [decoding("a", tpot_ms=500.0)], Limits(FULL, 1))
    assert Continuous(COST).plan(alone, 1.0).budgets == {"a": FULL}
    assert Continuous(COST).plan(replace(alone, waiting=[request("b")]), 1.0).budgets == {"a": 2}


def test_nobody_joins_who_would_slow_everyone_below_the_pace_even_at_the_floors() -> None:
    running = [decoding(f"r{i}", k_min=FULL, tpot_ms=32.0) for i in range(4)]
    waiting = [request(f"w{i}", arrival=0.99, k_min=FULL, tpot_ms=32.0, prompt_tokens=1) for i in range(8)]
    plan = Continuous(COST).plan(State(waiting, running, Limits(FULL, 100)), 1.0)
    batch = 4 + len(plan.admit)
    assert 0 < len(plan.admit) < 8
    assert COST.table(batch, FULL, 20) <= 0.9 * 32e-3 < COST.table(batch + 1, FULL, 1)
    late = Continuous(COST).plan(State(waiting, running, Limits(FULL, 100)), 20.0)  # but nobody waits for ever
    assert late.admit[0] == "w0"


def test_objectives_hold_where_time_allows_it() -> None:
    rng = np.random.default_rng(1)
    jobs = [
        Job(Request(f"r{i}", float(at), 60, 30, 2, FULL, 500.0, 40.0), 30)
        for i, at in enumerate(np.sort(rng.uniform(0, 20, 250)))
    ]
    ours = run(jobs, Continuous(COST), LIMITS).outcomes
    original = run(jobs, POLICIES.create("system-only", {"cost": COST}), LIMITS).outcomes
    assert np.mean([met(o) for o in ours]) > 0.95
    assert np.mean([met(o) for o in original]) < 0.9
    assert max(map(tpot, ours)) <= 0.04
    assert np.percentile([ttft(o) for o in ours], 95) <= 0.5


def test_an_objective_that_nobody_can_meet_does_not_bind_others() -> None:
    hopeless = replace(request("h", tpot_ms=0.1, k_active=2), best_effort=True)
    running = [Running(hopeless, 20, 5, 0.5, 2), decoding("a", tpot_ms=100.0)]
    assert Continuous(COST).plan(State([], running, LIMITS), 1.0).budgets == {"h": 2, "a": FULL}


def test_a_cap_keeps_budgets_where_sub_experts_are_what_costs() -> None:
    cost = cost_model(touched=60e-3, decode_work=1e-4)
    running = [decoding(f"r{i}", k_min=1, tpot_ms=40.0) for i in range(6)]
    state = State([], running, LIMITS)
    plain = Continuous(cost).plan(state, 1.0)
    capped = Continuous(cost, capped=True).plan(state, 1.0)
    assert plain.cap is None
    assert set(capped.budgets.values()) == {FULL}
    assert sum(plain.budgets.values()) < sum(capped.budgets.values())
    floors = cost.sub_experts * (1 - (1 - 1 / cost.sub_experts) ** 6)
    assert floors <= capped.cap < cost.sub_experts
    assert step_seconds(state, capped, cost) <= 0.9 * 0.04 + 60e-3 / cost.sub_experts
    assert Continuous(cost, capped=True).plan(State([], running[:1], LIMITS), 1.0).cap is None

"""The paper's policies against the formula, worked out by hand or by trying everything."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling_samples import FULL, cost_model, request, run

from moe_prism.scheduling import POLICIES, Limits, Request, Running, State
from moe_prism.scheduling.outcomes import Job
from moe_prism.scheduling.requests import memory_of

COST = cost_model()


def plan(name: str, waiting: list[Request], limits: Limits, now: float = 0.0, **options: float):
    return POLICIES.create(name, {"cost": COST, **options}).plan(State(waiting, [], limits), now)


@st.composite
def queues(draw: st.DrawFn) -> tuple[list[Request], Limits, float]:
    floors = draw(st.lists(st.tuples(st.integers(1, FULL), st.integers(0, FULL)), min_size=1, max_size=7))
    arrivals = sorted(draw(st.lists(st.floats(0, 10), min_size=len(floors), max_size=len(floors))))
    waiting = [
        request(
            f"r{i}",
            arrival=arrivals[i],
            k_min=floor,
            k_active=max(floor, most),
            prompt_tokens=draw(st.integers(1, 60)),
            max_tokens=draw(st.integers(1, 40)),
        )
        for i, (floor, most) in enumerate(floors)
    ]
    memory = draw(st.sampled_from([None, 120, 200]))
    return waiting, Limits(FULL, draw(st.integers(1, 8)), memory), draw(st.floats(arrivals[-1], 15))


def launched(waiting: list[Request], limits: Limits, now: float, t_max: float) -> tuple[list[str], int]:
    """The rule of the paper, word by word: all queues, their utilities, the triggers."""
    found = []
    for m in range(1, FULL + 1):
        queue = [r for r in waiting if r.k_min <= m <= r.k_active]
        full = len(queue) >= limits.max_running
        batch: list[Request] = []
        for r in queue[: limits.max_running]:
            if limits.memory_tokens is not None and sum(map(memory_of, [*batch, r])) > limits.memory_tokens:
                break
            batch.append(r)
        if not queue or (now - waiting[0].arrival > t_max and waiting[0] not in queue):
            continue
        tokens = sum(r.prompt_tokens + r.max_tokens for r in batch)
        found.append((full, tokens / COST.table(len(batch), m), m, [r.id for r in batch]))
    _, _, m, names = max(found)
    return names, m


@settings(max_examples=300, deadline=None)
@given(case=queues(), t_max=st.sampled_from([0.5, 5.0]))
def test_virtual_queues_launch_what_the_formula_says(case, t_max: float) -> None:
    waiting, limits, now = case
    names, m = launched(waiting, limits, now, t_max)
    found = plan("virtual-queues", waiting, limits, now, t_max=t_max)
    assert list(found.admit) == names
    assert set(found.budgets.values()) == {m}


def test_a_bigger_batch_serves_above_the_floor() -> None:
    # one step is dear, a budget cheap: 3 requests at 4 beat 2 at 2
    waiting = [request("a", k_min=2), request("b", k_min=2), request("c", k_min=4)]
    found = plan("virtual-queues", waiting, Limits(FULL, 8))
    assert found.admit == ("a", "b", "c")
    assert set(found.budgets.values()) == {4}


def test_the_triggers_come_before_utility() -> None:
    limits = Limits(FULL, max_running=2)
    lone = request("old", k_min=8, prompt_tokens=1, max_tokens=1)
    pair = [request(f"r{i}", arrival=1.0, k_min=1, k_active=1, max_tokens=1) for i in range(2)]
    big = [request("big", arrival=1.0, k_min=4, k_active=4, prompt_tokens=5000, max_tokens=500)]
    waiting = [lone, *pair, *big]
    assert plan("virtual-queues", waiting, limits, now=1.0, t_max=5).admit == ("r0", "r1")  # batch full
    assert plan("virtual-queues", [lone, pair[0], *big], limits, now=1.0, t_max=5).admit == ("big",)  # utility
    assert plan("virtual-queues", waiting, limits, now=5.0, t_max=5).admit == ("r0", "r1")  # not older than T_max
    assert plan("virtual-queues", waiting, limits, now=5.1, t_max=5).admit == ("old",)  # timeout


def test_fifo_takes_what_waits_at_the_highest_floor_and_nobody_joins() -> None:
    waiting = [request("a", k_min=2), request("b", k_min=5), request("c", k_min=1, k_active=3)]
    found = plan("fifo", waiting, Limits(FULL, 8))
    assert found.budgets == {"a": 5, "b": 5, "c": 3}  # nobody above what it wants
    assert plan("fifo-original", waiting, Limits(FULL, 8)).budgets == dict.fromkeys("abc", FULL)
    running = [Running(r, 20, 1, 0.5, found.budgets[r.id]) for r in waiting[:2]]
    later = POLICIES.create("fifo", {"cost": COST}).plan(State(waiting[2:], running, Limits(FULL, 8)), 1.0)
    assert later.admit == ()
    assert later.budgets == {"a": 5, "b": 5}


def test_a_batch_keeps_its_budget_when_its_highest_floor_has_ended() -> None:
    running = [Running(request("a", k_min=2), 20, 3, 0.5, 5), Running(request("b", k_min=3), 0, 0, None, 0)]
    found = POLICIES.create("fifo", {"cost": COST}).plan(State([], running, Limits(FULL, 8)), 1.0)
    assert found.budgets == {"b": 5}  # prompts first
    assert found.prefill == {"b": 20}


@pytest.mark.parametrize("name", ["fifo", "full-batch", "virtual-queues"])
def test_a_batch_keeps_its_budget_when_all_who_began_have_ended(name: str) -> None:
    """The first one's prompt takes a whole step and its only token ends it, before the other has begun."""
    jobs = [
        Job(request("before", max_tokens=40), 40),  # the others wait for it together
        Job(request("a", arrival=1e-3, prompt_tokens=64, max_tokens=1, k_min=5), 1),
        Job(request("b", arrival=1e-3, prompt_tokens=64, max_tokens=2, k_min=2), 2),
    ]
    policy = POLICIES.create(name, {"cost": COST})
    jobs = jobs[1:] if name == "full-batch" else jobs  # which waits until there are two
    *_, first, second = run(jobs, policy, Limits(FULL, 2, max_prefill=64)).outcomes
    budget = max(first.token_budgets)
    assert budget >= 5
    assert second.prompt_budgets == {budget: 64}
    assert second.token_budgets == {budget: 2}


def test_long_prompts_are_computed_in_pieces_before_anyone_decodes() -> None:
    waiting = [request("a", prompt_tokens=50), request("b", prompt_tokens=50)]
    found = plan("fifo", waiting, Limits(FULL, 8, max_prefill=64))
    assert found.prefill == {"a": 50, "b": 14}
    running = [Running(waiting[0], 50, 1, 0.1, 2), Running(waiting[1], 14, 0, None, 2)]
    later = POLICIES.create("fifo", {"cost": COST}).plan(State([], running, Limits(FULL, 8, max_prefill=64)), 1.0)
    assert later.prefill == {"b": 36}
    assert later.budgets == {"b": 2}


@pytest.mark.parametrize(
    ("count", "now", "starts"), [(2, 1.0, False), (3, 1.0, True), (2, 30.0, True), (1, 29.9, False)]
)
def test_full_batch_waits_for_a_full_batch_or_max_wait(count: int, now: float, starts: bool) -> None:
    waiting = [request(f"r{i}", k_min=i + 1) for i in range(count)]
    found = plan("full-batch", waiting, Limits(FULL, 3), now)
    assert len(found.admit) == (count if starts else 0)
    assert set(found.budgets.values()) == ({count} if starts else set())
    assert found.wake == (None if starts else 30.0)


def test_full_batch_is_full_when_memory_is() -> None:
    waiting = [request(f"r{i}") for i in range(3)]  # 30 tokens each
    assert plan("full-batch", waiting, Limits(FULL, 8, memory_tokens=70)).admit == ("r0", "r1")
    assert plan("full-batch", waiting, Limits(FULL, 8, memory_tokens=90)).admit == ()

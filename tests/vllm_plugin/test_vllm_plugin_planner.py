from __future__ import annotations

from typing import cast

from hypothesis import given
from hypothesis import strategies as st
from scheduling_costs import expensive, free

from moe_prism.scheduling import POLICIES, CostModel, Limits, Policy, Request
from moe_prism.vllm_plugin.planner import Part, Planner, Track

FULL = 16


def planner(cost: CostModel, wanted: list[Request], places: int = 8) -> Planner:
    made = Planner(POLICIES.get("continuous")(cost), Limits(FULL, places))
    made.tracks.update({request.id: Track(request) for request in wanted})
    return made


def request(name: str, k_min: int, k_active: int, **more: float) -> Request:
    return Request(name, 100.0, 10, 50, k_min, k_active, **more)


def test_where_steps_are_free_everybody_gets_what_he_wants() -> None:
    found = planner(free(), [request("a", 4, 16), request("b", 9, 9)])
    parts = [Part("a", 10, 1, 3), Part("b", 0, 10, 0)]
    assert found.budgets(parts, [], 100.1) == {"a": 16, "b": 9}


def test_under_load_budgets_fall_to_the_floor_and_rise_when_it_is_gone() -> None:
    crowd = [request(str(i), 2, 16, tpot_ms=30.0) for i in range(8)]
    found = planner(expensive(), [*crowd, *(request(f"w{i}", 2, 16) for i in range(40))])
    parts = [Part(r.id, 20, 1, 11) for r in crowd]
    waiting = [f"w{i}" for i in range(40)]
    busy = found.budgets(parts, waiting, 101.0)
    assert set(busy.values()) == {2}
    alone = busy["0"]
    for step in range(40):
        now = 101.0 + step / 100
        alone = found.budgets([Part("0", 20 + step, 1, 11 + step)], [], now)["0"]
    assert alone == 16


def test_where_no_request_leaves_a_choice_the_policy_is_not_asked() -> None:
    found = planner(expensive(), [request("a", 16, 16), request("b", 9, 9)])
    found.policy = cast(Policy, None)
    assert found.budgets([Part("a", 10, 1, 3), Part("b", 0, 10, 0)], [], 100.1) == {"a": 16, "b": 9}
    assert found.tracks["a"].budget == 16
    assert found.admitted == 2


def test_a_request_that_the_policy_leaves_out_runs_at_its_floor() -> None:
    many = [request(str(i), 3, 16) for i in range(4)]
    found = planner(expensive(), many, places=1)
    budgets = found.budgets([Part(r.id, 0, 10, 0) for r in many], [], 100.0)
    assert set(budgets) == {r.id for r in many}
    assert all(budgets[r.id] >= 3 for r in many)


@given(
    st.lists(
        st.tuples(st.integers(1, FULL), st.integers(1, FULL), st.integers(0, 20), st.integers(0, 9)),
        min_size=1,
        max_size=12,
    ),
    st.floats(100, 200),
    st.integers(0, 3),
)
def test_budgets_keep_to_every_requests_bounds(
    drawn: list[tuple[int, int, int, int]], now: float, waiting: int
) -> None:
    wanted = [request(str(i), min(a, b), max(a, b)) for i, (a, b, _, _) in enumerate(drawn)]
    late = [request(f"w{i}", 1, FULL) for i in range(waiting)]
    found = planner(expensive(), [*wanted, *late])
    parts = [Part(str(i), before, 1, generated) for i, (_, _, before, generated) in enumerate(drawn)]
    budgets = found.budgets(parts, [r.id for r in late], now)
    assert list(budgets) == [r.id for r in wanted]
    assert all(r.k_min <= budgets[r.id] <= r.k_active for r in wanted)

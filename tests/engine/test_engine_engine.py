"""The engine's promises: memory comes back, faults stay with their requests, every request is answered exactly once."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_drive import COST, AtFloor, alone, drain, engine_of, generation, tokens_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from making import elastic_model
from tiny import tokens
from transformers import PreTrainedModel

from moe_prism.elastic import dial_of, full_budget, layer
from moe_prism.engine import Engine, FailedEvent, Generation, Sampling, TokenEvent
from moe_prism.errors import PrismError
from moe_prism.scheduling import POLICIES, Limits, Policy, Request, State, StepPlan


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return elastic_model("olmoe", tmp_path_factory.mktemp("model"))


def prompt(length: int, seed: int = 0) -> list[int]:
    return tokens(1, length, seed)[0].tolist()


def test_cancelling_frees_memory_before_the_next_step(model: PreTrainedModel) -> None:
    engine = engine_of(model, memory_tokens=40)
    engine.submit(generation("a", prompt(10), 20, 4))
    engine.submit(generation("b", prompt(10), 20, 4))
    engine.step()
    assert engine.stats.running == 1  # b does not fit beside a
    engine.cancel("a")
    events = engine.step()
    assert [event.id for event in events] == ["b"]
    assert engine.stats.cache_use == 30 / 40
    assert tokens_of([*events, *drain(engine)["b"]]) == alone(model, prompt(10), 20, 4)[0]
    assert engine.stats.cache_use == 0
    engine.cancel("a")  # long gone
    assert engine.step() == []


def test_cancelling_a_waiting_request(model: PreTrainedModel) -> None:
    engine = engine_of(model)
    engine.submit(generation("a", prompt(3), 2, 4))
    engine.cancel("a")
    assert engine.step() == []
    assert engine.stats.waiting == 0
    engine.submit(generation("a", prompt(3), 2, 4))  # the id is free again
    assert len(drain(engine)["a"]) == 2


def test_runs_moved_together_keep_their_keys_and_values(model: PreTrainedModel) -> None:
    engine = engine_of(model, memory_tokens=64)
    budgets = {"a": 3, "b": 5, "c": 2, "d": 4}
    for number, id in enumerate("abcd"):
        engine.submit(generation(id, prompt(8, number), 8, budgets[id]))
    for _ in range(3):
        early = engine.step()
    assert len(early) == 4
    engine.cancel("a")
    engine.cancel("c")
    engine.submit(generation("wide", prompt(20, 9), 12, 1))  # 32 places: the two gaps of 16 have to meet
    later = drain(engine)
    assert tokens_of(later["wide"]) == alone(model, prompt(20, 9), 12, 1)[0]
    for number, id in ((1, "b"), (3, "d")):
        assert tokens_of(later[id]) == alone(model, prompt(8, number), 8, budgets[id])[0][3:]


def test_a_failed_step_answers_its_requests_and_the_engine_goes_on(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(model, memory_tokens=40)
    engine.submit(generation("a", prompt(10), 5, 4))
    engine.submit(generation("b", prompt(30), 5, 4))  # waits: no room
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", lambda **_: (_ for _ in ()).throw(RuntimeError("out of luck")))
        assert engine.step() == [FailedEvent("a", "RuntimeError: out of luck")]
    assert engine.stats.cache_use == 0
    assert tokens_of(drain(engine)["b"]) == alone(model, prompt(30), 5, 4)[0]
    assert dial_of(model).step(3, torch.device("cpu"), 0) is None  # no budgets are left behind


def test_a_request_with_logits_that_are_not_finite_fails_alone(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(model)
    runner = engine._runner
    forward = runner.forward

    def broken(*arguments: Any) -> torch.Tensor:
        logits = forward(*arguments).clone()
        logits[0] = torch.nan
        return logits

    for id in "ab":
        engine.submit(generation(id, prompt(5), 4, 4))
    with monkeypatch.context() as patch:
        patch.setattr(runner, "forward", broken)
        first = engine.step()
    assert {type(event) for event in first if event.id == "a"} == {FailedEvent}
    assert len(drain(engine)["b"]) == 3


class Lowest(AtFloor):
    def plan(self, state: State, now: float) -> StepPlan:
        plan = super().plan(state, now)
        return replace(plan, budgets=dict.fromkeys(plan.budgets, 1))


class Broken(AtFloor):
    def plan(self, state: State, now: float) -> StepPlan:
        raise KeyError("no plan")


@pytest.mark.parametrize(("policy", "error"), [(Lowest(), "allowed are 3"), (Broken(), "no plan")])
def test_a_bad_policy_breaks_no_floor(model: PreTrainedModel, policy: Policy, error: str) -> None:
    engine = engine_of(model, policy)
    engine.submit(generation("a", prompt(5), 4, 3))
    (event,) = engine.step()
    assert isinstance(event, FailedEvent)
    assert error in event.error
    assert engine.stats.waiting == engine.stats.running == 0


def test_seeds_decide_whoever_else_is_in_the_batch(model: PreTrainedModel) -> None:
    def run(names: str, seed: int | None = 7) -> list[int]:
        engine = engine_of(model)
        for number, id in enumerate(names):
            chosen = Sampling(1.3, 0.9, seed) if id == "x" else Sampling(0.7, 1.0, number)
            engine.submit(generation(id, prompt(6, 0 if id == "x" else number), 10, 4, chosen))
        return tokens_of(drain(engine)["x"])

    assert run("x") == run("axb") == run("x")
    assert run("x") != run("x", 8)
    assert run("x", None) != run("x", None)


def test_draws_follow_the_distribution(model: PreTrainedModel) -> None:
    engine = engine_of(model, max_running=64, memory_tokens=64 * 8)
    first = alone(model, prompt(6), 1, 4)
    for seed in range(64):
        engine.submit(generation(str(seed), prompt(6), 1, 4, Sampling(1.0, 0.3, seed, logprobs=96)))
    events = drain(engine)
    some = events["0"][0]
    assert isinstance(some, TokenEvent)
    assert sum(torch.tensor([p for _, p in some.top]).exp().tolist()) == pytest.approx(1, abs=1e-4)
    total, allowed = 0.0, set()
    for token, logprob in some.top:  # the nucleus: least tokens that reach 0.3
        allowed.add(token)
        total += float(torch.tensor(logprob).exp())
        if total >= 0.3:
            break
    drawn = {tokens_of(events[str(seed)])[0] for seed in range(64)}
    assert drawn <= allowed
    assert first[0][0] in drawn
    assert len(drawn) > 1 or len(allowed) == 1


def test_stop_tokens(model: PreTrainedModel) -> None:
    expected = alone(model, prompt(6), 8, 4)[0]
    stop = expected[3]
    engine = engine_of(model)
    engine.submit(generation("a", prompt(6), 8, 4, Sampling(stop_token_ids=(stop,))))
    events = drain(engine)["a"]
    assert tokens_of(events) == expected[: expected.index(stop) + 1]
    assert [event.finished for event in events if isinstance(event, TokenEvent)][-1] == "stop"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": [5, 96]}, "from 0 to 95, got 96"),
        ({"prompt": [5] * 3}, "prompt_tokens must be the prompt's length, 3"),
        ({"sampling": Sampling(temperature=-1)}, "temperature must be 0 or more"),
        ({"sampling": Sampling(top_p=0)}, "top_p must be above 0"),
        ({"sampling": Sampling(logprobs=97)}, "from 0 to 96"),
        ({"sampling": Sampling(stop_token_ids=(200,))}, "stop_token_ids"),
        ({"request": Request("a", 0.0, 2, 4, 17, 17)}, "k_min must be from 1 to 16"),
        ({"request": Request("a", 0.0, 2, 200, 1, 1)}, "context is 128"),
        ({"request": Request("a", 0.0, 2, 600, 1, 1)}, "memory for 602 tokens"),
    ],
)
def test_bad_requests_are_refused(model: PreTrainedModel, changes: dict[str, Any], message: str) -> None:
    engine = engine_of(model)
    good = Generation(Request("a", 0.0, 2, 4, 1, 16), [5, 6])
    engine.check(good)
    with pytest.raises(PrismError, match=message):
        engine.submit(replace(good, **changes))
    assert engine.stats.waiting == 0


def test_bad_limits_and_ids_are_refused(model: PreTrainedModel) -> None:
    with pytest.raises(PrismError, match="memory_tokens must be a number"):
        engine_of(model, memory_tokens=None)
    with pytest.raises(PrismError, match="full_budget must be the model's, 16, got 8"):
        Engine(model, AtFloor(), Limits(8, 4, 64))
    engine = engine_of(model)
    engine.submit(generation("a", prompt(3), 2, 4))
    with pytest.raises(PrismError, match="in use"):
        engine.submit(generation("a", prompt(3), 2, 4))


def test_waiting_ends_when_a_request_comes(model: PreTrainedModel) -> None:
    engine = engine_of(model)
    timer = threading.Timer(0.05, engine.submit, [generation("a", prompt(3), 2, 4)])
    began = time.monotonic()
    timer.start()
    engine.wait(30)
    assert time.monotonic() - began < 20
    assert len(drain(engine)["a"]) == 2
    began = time.monotonic()
    engine.wait(0.05)
    assert time.monotonic() - began >= 0.04


ARRIVAL = st.tuples(
    st.integers(0, 12),  # step
    st.integers(1, 24),  # prompt
    st.integers(1, 10),  # tokens
    st.integers(1, 16),  # floor
    st.integers(0, 16),  # above it
    st.one_of(st.none(), st.integers(0, 15)),  # steps until it is cancelled
)


@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(ARRIVAL, min_size=1, max_size=10), st.sampled_from(sorted(POLICIES)), st.integers(1, 16))
def test_every_request_is_answered_exactly_once(
    model: PreTrainedModel, arrivals: list[tuple[Any, ...]], policy: str, piece: int
) -> None:
    now = 0.0
    limits = Limits(full_budget(model), 4, 80, piece)
    engine = Engine(model, POLICIES.create(policy, {"cost": COST}), limits, clock=lambda: now)
    asked, cancelled = {}, set()
    events: dict[str, list[Any]] = {}
    step = 0
    while step <= 12 or engine.stats.waiting or engine.stats.running:
        for number, (at, length, count, floor, more, quit_after) in enumerate(arrivals):
            id = str(number)
            if at == step:
                request = Request(id, now, length, count, floor, min(16, floor + more))
                asked[id] = request
                engine.submit(Generation(request, prompt(length, number)))
            if quit_after is not None and at + quit_after == step and id in asked:
                engine.cancel(id)
                cancelled.add(id)
        for event in engine.step():
            events.setdefault(event.id, []).append(event)
        step += 1
        now += 0.5
        assert step < 2000, "somebody starves"
    for id, request in asked.items():
        got = events.get(id, [])
        assert all(isinstance(event, TokenEvent) and event.budget >= request.k_min for event in got)
        ended = [event.finished for event in got if event.finished]
        if ended:
            assert ended == ["length"]
            assert len(got) == request.max_tokens
        else:
            assert id in cancelled
    assert engine.stats.cache_use == 0


def test_full_budget_takes_the_models_own_path(model: PreTrainedModel, tmp_path: Path) -> None:
    seen = []
    dial = dial_of(model)
    original = dial.step

    def spy(*arguments: Any) -> Any:
        seen.append(original(*arguments))
        return seen[-1]

    engine = engine_of(model)
    dial.step = spy  # type: ignore[method-assign]
    try:
        engine.submit(generation("a", prompt(5), 3, 16))
        engine.submit(generation("b", prompt(5), 3, 16))
        drain(engine)
        assert set(seen) == {None}
        engine.submit(generation("c", prompt(5), 1, 15))
        drain(engine)
        assert seen[-1] is not None
    finally:
        del dial.step  # type: ignore[method-assign]


@dataclass(frozen=True)
class Capped(AtFloor):
    """Everyone wants full budget; decoding requests share few sub-experts."""

    def plan(self, state: State, now: float) -> StepPlan:
        plan = super().plan(state, now)
        return replace(plan, budgets=dict.fromkeys(plan.budgets, 16), cap=5)


def test_a_cap_binds_decoding_requests_above_their_floors(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[list[int], list[int]]] = []
    original = layer.gather_selection

    def spy(chosen: torch.Tensor, *rest: Any) -> Any:
        found = original(chosen, *rest)
        steps.append((chosen.flatten(1).sum(1).tolist(), found.sub_expert.unique().tolist()))
        return found

    monkeypatch.setattr(layer, "gather_selection", spy)
    engine = engine_of(model, Capped())
    for number, id in enumerate("abc"):
        engine.submit(Generation(Request(id, 0.0, 4, 3, 2, 16), prompt(4, number)))
    engine.step()
    assert all(set(counts) == {16} for counts, _ in steps)  # prompts have their budgets
    steps.clear()
    engine.step()
    assert len(steps) == 2  # layers
    for counts, loaded in steps:
        assert min(counts) >= 2
        assert len(loaded) <= max(5, 3 * 2)
        assert max(counts) < 16

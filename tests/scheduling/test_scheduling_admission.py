"""Objectives that no budget can meet are answered when a request comes; impossible values are refused."""

from __future__ import annotations

import math

import pytest
from scheduling_samples import FULL, cost_model, request, run

from moe_prism.errors import PrismError
from moe_prism.scheduling import POLICIES, Admission, Job, Limits, Unmeetable
from moe_prism.scheduling.summary import summarise, tpot, ttft

COST = cost_model()
LIMITS = Limits(FULL, 4, memory_tokens=500)


@pytest.mark.parametrize("name", ["ttft_ms", "tpot_ms"])
def test_the_least_possible_time_is_what_an_idle_engine_needs(name: str) -> None:
    serve = Admission(COST, LIMITS)
    asked = request(prompt_tokens=200, max_tokens=50, k_active=2)
    alone = run([Job(asked, 2)], POLICIES.create("fifo", {"cost": COST}), LIMITS).outcomes[0]
    least = {"ttft_ms": serve.least_ttft_ms(asked), "tpot_ms": serve.least_tpot_ms(asked)}[name]
    found = {"ttft_ms": ttft(alone), "tpot_ms": tpot(alone)}[name] * 1e3
    assert least == pytest.approx(found, rel=0.01)
    possible = request(prompt_tokens=200, max_tokens=50, **{name: least * 1.001})
    assert serve(possible) is possible
    hopeless = request(prompt_tokens=200, max_tokens=50, **{name: least * 0.999})
    served = serve(hopeless)
    assert served.best_effort
    assert served.k_active == served.k_min == hopeless.k_min
    with pytest.raises(Unmeetable, match=rf"no budget can meet {name} .*at least .*ask for more time, or lower k_min"):
        Admission(COST, LIMITS, "refuse")(hopeless)


def test_pieces_of_prompts_count() -> None:
    whole, pieces = (Admission(COST, Limits(FULL, 4, max_prefill=most)) for most in (None, 16))
    assert pieces.least_ttft_ms(request(prompt_tokens=160)) > whole.least_ttft_ms(request(prompt_tokens=160)) + 50


def test_full_budget_may_be_the_fastest_where_a_gate_is_dear() -> None:
    dear = Admission(cost_model(gated=0.5), LIMITS)
    assert dear.least_tpot_ms(request(k_min=FULL - 1)) == pytest.approx(dear.least_tpot_ms(request(k_min=FULL)))


@pytest.mark.parametrize("hopeless", ["serve", "refuse"])
def test_the_answer_is_never_silent(hopeless: str) -> None:
    jobs = [Job(request("no", tpot_ms=0.01), 5), Job(request("yes", tpot_ms=500.0), 5)]
    found = run(jobs, POLICIES.create("continuous", {"cost": COST}), LIMITS, hopeless=hopeless)
    record = summarise(found.outcomes, found.seconds)
    first, second = found.outcomes
    assert second.token_budgets == {FULL: 5}  # the other's objective does not bind it
    if hopeless == "refuse":
        assert first.refused
        assert math.isnan(first.admitted)
        assert (record["refused"], record["best_effort"], record["finished"]) == (1, 0, 1)
    else:
        assert first.token_budgets == {first.job.request.k_min: 5}
        assert (record["refused"], record["best_effort"], record["finished"]) == (0, 1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k_min": FULL + 1, "k_active": FULL + 1}, rf"k_min must be from 1 to {FULL} \(full budget\), got {FULL + 1}"),
        ({"k_min": 0}, "k_min must be from 1"),
        ({"k_active": FULL + 1}, f"k_active must be from k_min = 2 to {FULL}"),
        ({"k_active": 1}, "k_active must be from k_min = 2"),
        ({"prompt_tokens": 0}, "prompt_tokens must be 1 or more, got 0"),
        ({"max_tokens": 0}, "max_tokens must be 1 or more, got 0"),
        ({"ttft_ms": 0.0}, "ttft_ms must be above 0 milliseconds, got 0.0"),
        ({"tpot_ms": math.nan}, "tpot_ms must be above 0 milliseconds, got nan"),
        ({"arrival": math.inf}, "arrival must be a time in seconds, got inf"),
        ({"prompt_tokens": 495}, "needs memory for 505 tokens .*the engine has 500"),
    ],
)
def test_impossible_requests_are_refused(changes: dict, message: str) -> None:
    for hopeless in ("serve", "refuse"):
        with pytest.raises(PrismError, match=message) as caught:
            Admission(COST, LIMITS, hopeless)(request(**changes))
        assert not isinstance(caught.value, Unmeetable)


def test_impossible_settings() -> None:
    with pytest.raises(PrismError, match='"serve" or "refuse", got \'drop\''):
        Admission(COST, LIMITS, "drop")
    for name in ("full_budget", "max_running", "memory_tokens", "max_prefill"):
        with pytest.raises(PrismError, match=f"{name} must be 1 or more, got 0"):
            Limits(**({"full_budget": 8, "max_running": 4} | {name: 0}))

"""Figures of a run, worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scheduling_samples import request

from moe_prism.scheduling import Job, Outcome
from moe_prism.scheduling.summary import met, summarise, tpot, ttft


def outcome(name: str, arrival: float, first: float, times: list[tuple[int, float]], **asked: object) -> Outcome:
    """One token per (budget, time); the first is the prompt's."""
    done = Outcome(Job(request(name, arrival=arrival, prompt_tokens=4, **asked), len(times)))
    done.admitted = arrival
    done.prefill(4, times[0][0])
    for k, at in times:
        done.generate(k, at)
    done.finished = times[-1][1]
    assert done.first_token == first
    return done


RUN = [
    outcome("a", 0.0, 1.0, [(2, 1.0), (4, 1.5), (8, 2.0)], ttft_ms=1000.0, tpot_ms=500.0),
    outcome("b", 1.0, 4.0, [(8, 4.0)], ttft_ms=2999.0),
    outcome("c", 1.0, 2.0, [(1, 2.0), (8, 4.0)], tpot_ms=1999.0, k_min=2),
]


def test_figures_by_hand() -> None:
    unfinished = Outcome(Job(request("d"), 3))
    record = summarise([*RUN, unfinished, Outcome(Job(request("e"), 1), refused=True)], 4.0, {2: 0.4, 4: 0.2, 8: 0.0})
    assert (record["requests"], record["finished"], record["refused"]) == (5, 3, 1)
    assert record["throughput_rps"] == 0.75
    assert record["goodput_rps"] == 0.25  # b comes a millisecond late, c's second token too
    assert record["tokens_per_s"] == 1.5
    assert record["floor_violations"] == 1
    assert record["mean_k"] == pytest.approx((2 + 4 + 8 + 8 + 1 + 8) / 6)
    assert record["mean_kl"] == pytest.approx((0.4 + 0.2 + 0 + 0 + 0.4 + 0) / 6)  # below the least: as the least
    assert record["mean_prompt_k"] == pytest.approx((2 + 8 + 1) / 3)
    assert record["mean_prompt_kl"] == pytest.approx((0.4 + 0 + 0.4) / 3)
    for name, values in (("ttft_ms", [1.0, 3.0, 1.0]), ("tpot_ms", [0.5, 2.0]), ("e2e_ms", [2.0, 3.0, 3.0])):
        assert list(record[name].values()) == pytest.approx(np.percentile(np.array(values) * 1e3, [50, 90, 99]))
        assert list(record[name]) == ["p50", "p90", "p99"]


def test_objectives_hold_to_the_millisecond() -> None:
    assert [met(o) for o in RUN] == [True, False, False]
    assert (ttft(RUN[1]), tpot(RUN[1]), tpot(RUN[0])) == (3.0, 0.0, 0.5)
    assert not met(Outcome(Job(request(), 1)))


def test_nothing_ended() -> None:
    record = summarise([], 0.0, {1: 0.5})
    assert record["throughput_rps"] == 0
    assert all(math.isnan(record[name]) for name in ("mean_k", "mean_kl", "mean_prompt_k"))
    assert all(math.isnan(value) for value in record["ttft_ms"].values())


def test_a_run_without_measured_quality_says_nothing_of_it() -> None:
    assert not {"mean_kl", "mean_prompt_kl"} & summarise(RUN, 4.0).keys()

"""Poisson arrivals, mixes and recorded traces; bad lines are named."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moe_prism.errors import PrismError
from moe_prism.scheduling.workloads import Mix, Trace, jobs_of, poisson

MIX = Mix(16)
HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
GOOD = "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"


def test_poisson_arrivals_have_the_rate_and_spread_of_a_poisson_process() -> None:
    counts = []
    for seed in range(40):
        jobs = poisson(5.0, 60.0, [(10, 2), (30, 4)], MIX, seed)
        arrivals = [job.request.arrival for job in jobs]
        assert arrivals == sorted(arrivals)
        assert 0 <= arrivals[0] <= arrivals[-1] <= 60
        counts.append(len(jobs))
        assert {(job.request.prompt_tokens, job.output_tokens) for job in jobs} == {(10, 2), (30, 4)}
    assert np.mean(counts) == pytest.approx(300, abs=10)
    assert np.var(counts) == pytest.approx(300, rel=0.5)
    gaps = np.diff([job.request.arrival for job in poisson(5.0, 2000.0, [(1, 1)], MIX, 0)])
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.05)


def test_the_same_seed_gives_the_same_requests() -> None:
    assert poisson(2.0, 30.0, [(10, 2), (5, 3)], MIX, 7) == poisson(2.0, 30.0, [(10, 2), (5, 3)], MIX, 7)
    assert poisson(2.0, 30.0, [(10, 2)], MIX, 7) != poisson(2.0, 30.0, [(10, 2)], MIX, 8)


def test_floors_follow_the_mix() -> None:
    jobs = jobs_of([0.0] * 5000, [1] * 5000, [1] * 5000, MIX, 0)
    shares = Counter(job.request.k_min for job in jobs)
    assert shares.keys() == {4, 8, 16}
    assert [shares[k] / 5000 for k in (4, 8, 16)] == pytest.approx([0.4, 0.4, 0.2], abs=0.03)
    assert {job.request.k_active for job in jobs} == {16}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"floors": (0.5, 1.5), "weights": (1, 1)}, r"shares of full budget in \(0, 1\], got \[0.5, 1.5\]"),
        ({"floors": (0.0,), "weights": (1,)}, r"in \(0, 1\]"),
        ({"floors": (), "weights": ()}, "one weight per floor"),
        ({"weights": (1,)}, "one weight per floor"),
        ({"weights": (1, -1, 1)}, "must not be negative"),
        ({"weights": (0, 0, 0)}, "nor all zero"),
        ({"weights": (1, float("nan"), 1)}, "must not be negative"),
    ],
)
def test_impossible_mixes(changes: dict, message: str) -> None:
    with pytest.raises(PrismError, match=message):
        Mix(16, **changes)


def test_impossible_rates() -> None:
    for rate, seconds, lengths in ((0, 1, [(1, 1)]), (1, 0, [(1, 1)]), (1, 1, [])):
        with pytest.raises(PrismError, match="must be above 0 and lengths not empty"):
            poisson(rate, seconds, lengths, MIX, 0)


def write(folder: Path, text: str) -> Path:
    (folder / "trace.csv").write_text(text)
    return folder / "trace.csv"


def test_a_trace_is_read_and_scaled(tmp_path: Path) -> None:
    trace = Trace.read(write(tmp_path, HEAD + GOOD))
    assert trace.arrivals == pytest.approx([0.0, 4.314579], abs=1e-6)
    assert (trace.prompts, trace.outputs) == ([374, 396], [44, 109])
    half = trace.scaled(time=0.5, length=0.01)
    assert half.arrivals == pytest.approx([0.0, 2.1572895], abs=1e-6)
    assert (half.prompts, half.outputs) == ([4, 4], [1, 1])
    assert trace.scaled(first=1).arrivals == [0.0]
    for scales in ({"time": 0}, {"length": -1}, {"first": 0}):
        with pytest.raises(PrismError, match=r"must be above 0|at least 1"):
            trace.scaled(**scales)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + GOOD + "2023-11-16 18:15:47.0000000,1,1\n", "line 4: its time .* is before the line in front"),
        (HEAD + "2023-11-16 18:15:46.6805900,,44\n", "line 2: needs a time and two whole numbers"),
        (HEAD + GOOD + "2023-11-16 18:16:46.6805900,12\n", "line 4: needs a time and two whole numbers"),
        (HEAD + GOOD + ",12,4\n", "line 4: needs a time"),
        (HEAD + "2023-11-16 18:15:46.6805900,-3,44\n", "line 2: tokens must be 1 or more, got -3 and 44"),
        (HEAD + "2023-11-16 18:15:46.6805900,3,0\n", "line 2: tokens must be 1 or more, got 3 and 0"),
        (HEAD + "2023-11-16 18:15:46.6805900,3.5,1\n", "line 2: needs"),
        (HEAD + "yesterday,3,1\n", "line 2: needs"),
        (HEAD + GOOD + "2023-11-16 18:16:46+00:00,3,1\n", "line 4: .*time zone"),
        (HEAD, "has no requests"),
        ("time,in,out\n", "has no column TIMESTAMP, ContextTokens, GeneratedTokens; it has time, in, out"),
        ("", "has no column TIMESTAMP"),
    ],
)
def test_a_bad_trace_names_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PrismError, match=message):
        Trace.read(write(tmp_path, text))


def test_a_trace_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match=r"none\.csv cannot be read"):
        Trace.read(tmp_path / "none.csv")


def test_the_real_trace(shared_data: Path) -> None:
    trace = Trace.read(shared_data / "traces" / "azure-llm-2023-conv.csv")
    assert len(trace.arrivals) == 19_366
    assert 3400 < trace.arrivals[-1] < 3600

"""The load generator against the real server: what it says is what the server counted."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))

from making import recipe, save_stock
from serving_live import NAME, OPTIONS, live_server

import moe_prism
from moe_prism.bench.http_load import HttpLoad
from moe_prism.scheduling.workloads import Mix, jobs_of, poisson
from moe_prism.serving.app import ServerLimits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("http")
    moe_prism.make_elastic(save_stock(folder / "stock"), folder / "elastic", recipe())
    return folder / "elastic"


@pytest.mark.parametrize("stream", [True, False])
def test_a_closed_loop_counts_what_the_server_counted(stream: bool, checkpoint: Path) -> None:
    jobs = jobs_of([0.0] * 12, [4] * 12, [5] * 12, Mix(16, (0.5, 1.0), (0.5, 0.5), 60_000, 60_000), 0)
    with live_server(checkpoint) as live:
        before = live.engine.stats.tokens
        run = HttpLoad(live.url, NAME, stream=stream).saturate(jobs, [[5, 6, 7, 8]] * 12, 3)
        text = httpx2.get(f"{live.url}/metrics").text
        assert live.engine.stats.tokens - before == 60
    record = run.record()
    assert record["finished"] == 12
    assert sum(o.tokens for o in run.outcomes) == 60
    assert record["goodput_rps"] == record["throughput_rps"] > 0
    assert (record["errors"], record["refused"], record["floor_violations"]) == ({}, 0, 0)
    total = re.search(r"token_k_active_sum\{\S* (\S+)", text)
    assert total is not None
    assert record["mean_k"] == pytest.approx(float(total[1]) / 60)
    starts = sorted(o.job.request.arrival for o in run.outcomes)
    first = min(o.finished for o in run.outcomes)
    assert starts[2] < first <= starts[3], "three clients have three requests at a time"


def test_an_open_loop_sends_at_arrivals_and_tells_refusals_apart(checkpoint: Path) -> None:
    jobs = poisson(60, 1.0, [(4, 40)], Mix(16, (1.0,), (1.0,), 1e4, 1e4), 0)
    with live_server(checkpoint, ServerLimits(max_waiting=1), replace(OPTIONS, max_running=1)) as live:
        run = HttpLoad(live.url, NAME).replay(jobs, [[5, 6, 7, 8]] * len(jobs))
    record = run.record()
    assert record["requests"] == len(jobs)
    assert record["refused"] > 0
    assert record["finished"] + record["refused"] == len(jobs)
    assert record["errors"] == {}
    assert all(o.first_token > o.job.request.arrival for o in run.outcomes if not o.refused)


def test_an_absent_server_is_an_error_of_every_request() -> None:
    jobs = jobs_of([0.0] * 3, [4] * 3, [5] * 3, Mix(16), 0)
    run = HttpLoad("http://127.0.0.1:9", NAME).saturate(jobs, [[5]] * 3, 2)
    assert run.record()["errors"] == {"APIConnectionError": 3}
    assert run.record()["finished"] == 0

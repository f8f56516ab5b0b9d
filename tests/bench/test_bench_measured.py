"""Policies on a real engine: every request is served as it was asked for, and the record says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from making import elastic_model
from transformers import PreTrainedModel

from moe_prism.bench.measured import run_measurement, targets
from moe_prism.bench.open_loop import serve_jobs
from moe_prism.bench.results import write_results
from moe_prism.bench.scenario import Scenario
from moe_prism.engine import Engine
from moe_prism.errors import PrismError
from moe_prism.scheduling import POLICIES, CostModel, Job, Limits, Request
from moe_prism.scheduling.step_load import TERMS
from moe_prism.scheduling.summary import summarise

COST = CostModel(tuple(2e-3 if term == "step" else 1e-5 for term in TERMS), 16, 32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return elastic_model("olmoe", tmp_path_factory.mktemp("model"))


def test_requests_come_when_they_are_due(model: PreTrainedModel) -> None:
    engine = Engine(model, POLICIES.create("continuous", {"cost": COST}), Limits(16, 4, 200))
    jobs = [Job(Request(f"r{i}", 5.0 + 0.2 * i, 6, 5, 3, 9, 1000.0, 1000.0), 5) for i in range(4)]
    outcomes, seconds = serve_jobs(engine, jobs, 96, 0)
    assert seconds >= 0.6
    first = outcomes[0].job.request.arrival
    for i, outcome in enumerate(outcomes):
        assert outcome.job.request.id == f"r{i}"
        assert outcome.job.request.arrival == pytest.approx(first + 0.2 * i)
        assert first + 0.2 * i <= outcome.admitted <= outcome.first_token <= outcome.finished
        assert outcome.prefilled == 6
        assert outcome.tokens == 5
        assert 3 <= outcome.least <= 9
    assert summarise(outcomes, seconds)["finished"] == 4


def trace_file(folder: Path) -> Path:
    rows = [f"2023-11-16 18:15:{i:02}.000000,{100 + i},{40 + i}" for i in range(60)]
    (folder / "trace.csv").write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]) + "\n")
    return folder / "trace.csv"


def test_the_record(model: PreTrainedModel, tmp_path: Path) -> None:
    trace = trace_file(tmp_path)
    names = ["fifo-original", "fifo", "continuous"]
    scenario = Scenario(trace=trace, policies=names, loads={"high": 1.5}, seconds=0.3, max_running=4)
    record = run_measurement(scenario, model, COST, 2)
    assert set(record["loads"]) == {"high", "trace"}
    for name, load in record["loads"].items():
        assert list(load["policies"]) == names
        for policy, row in load["policies"].items():
            beside = record["beside"][name][policy]
            assert row["requests"] == row["finished"] == beside["requests"] > 0
            assert row["floor_violations"] == 0
            assert record["validation"][name][policy]["throughput_rps"] == pytest.approx(
                beside["throughput_rps"] / row["throughput_rps"] - 1
            )
    assert record["targets"]["floor_violations"] == 0
    assert record["about"]["rounds"] == 2
    assert not record["simulated"]
    write_results(tmp_path / "out.json", record)
    assert json.loads((tmp_path / "out.json").read_text())["loads"]["high"]["policies"]["continuous"]["mean_k"] > 0


def test_it_goes_on_where_it_was_interrupted(model: PreTrainedModel, tmp_path: Path) -> None:
    names = ["continuous@low+high", "fifo@high"]
    loads = {"low": 0.5, "high": 1.0}
    scenario = Scenario(trace=trace_file(tmp_path), policies=names, loads=loads, seconds=0.2, max_running=4)
    ran: list[str] = []

    def stop(stage: str, done: int, total: int) -> None:
        if not ran or ran[-1] != stage:
            ran.append(stage)
        if stage == "high, continuous" and done == total and len(ran) < 4:
            raise KeyboardInterrupt

    partial = tmp_path / "partial.json"
    with pytest.raises(KeyboardInterrupt):
        run_measurement(scenario, model, COST, 1, stop, partial)
    assert ran == ["capacity, full budget", "low, continuous", "high, continuous"]
    record = run_measurement(scenario, model, COST, 1, lambda stage, *_: ran.append(stage), partial)
    assert set(ran[3:]) == {"high, continuous", "high, fifo"}
    assert not partial.exists()
    assert {name: list(load["policies"]) for name, load in record["loads"].items()} == {
        "low": ["continuous"],
        "high": ["continuous", "fifo"],
    }  # on the trace nobody was to run
    assert record["loads"]["low"]["policies"]["continuous"]["finished"] == record["loads"]["low"]["requests"]
    with pytest.raises(PrismError, match="loads are high, low, trace"):
        run_measurement(replace(scenario, policies=["fifo@medium"]), model, COST, 1)


def test_targets() -> None:
    def row(throughput: float, goodput: float, p99: float, kl: float) -> dict[str, object]:
        return {
            "throughput_rps": throughput,
            "goodput_rps": goodput,
            "ttft_ms": {"p99": p99},
            "mean_kl": kl,
            "floor_violations": 1,
        }

    figures = {
        "high": {"continuous": row(6, 5, 1, 0), "fifo-original": row(3, 1, 1, 0), "fifo": row(4, 2, 1, 0)},
        "low": {"continuous": row(1, 1, 1, 0.25)},
        "trace": {"continuous": row(1, 1, 20, 0), "system-only": row(1, 1, 80, 0), "fifo-original": row(1, 1, 100, 0)},
    }
    found = targets(figures)
    assert found == {
        "high_throughput_ratio": 2.0,
        "high_goodput_ratio": 2.5,
        "low_mean_kl": 0.25,
        "trace_ttft_p99_ratio": 0.25,
        "floor_violations": 7,
    }

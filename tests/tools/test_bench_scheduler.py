"""The bench of the scheduler's own time, small."""

from __future__ import annotations

import json
from pathlib import Path

import bench_scheduler
import pytest


def test_every_policy_is_timed_and_replicas_are_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:15:{i:02}.0000000,{100 + i},{20 + i}" for i in range(30)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    monkeypatch.setattr(bench_scheduler, "REPLICAS", (1, 2))
    words = ["x", "--trace", str(trace), "--tries", "1", "--requests", "300", "--per-replica", "10"]
    monkeypatch.setattr("sys.argv", [*words, "--out", str(tmp_path / "o.json")])
    assert bench_scheduler.main() == 0
    record = json.loads((tmp_path / "o.json").read_text())
    assert {name.split(",")[0] for name in record["plan_ms"]} == set(bench_scheduler.POLICIES)
    assert all(0 < row["p25"] <= row["p50"] <= row["p75"] for row in record["plan_ms"].values())
    sizes = [(row["replicas"], row["requests"]) for row in record["simulations"]]
    assert sizes == [(1, 10), (2, 20), (100, 300)]


def test_a_trace_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--trace", str(tmp_path / "no.csv"), "--out", str(tmp_path / "o.json")])
    assert bench_scheduler.main() == 2
    assert "cannot be read" in capsys.readouterr().err

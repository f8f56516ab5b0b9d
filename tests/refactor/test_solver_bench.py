"""The table maker on experts of a toy shape."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from moe_prism.refactor.solvers import SOLVERS


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "bench_solvers.py"
    spec = importlib.util.spec_from_file_location("bench_solvers", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(module.SYNTHETIC, "toy", (200, 32))
    return module


def test_writes_both_problem_sets_and_a_table(bench: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "results" / "solvers.json"
    for k in ("2", "mean"):
        arguments = ["--synthetic", "toy", "--experts", "2", "--switched-off", k, "--out", str(out)]
        assert bench.main(arguments) == 0
    results = json.loads(out.read_text())
    assert len(results) == 2
    for result in results.values():
        assert set(result["solvers"]) == {*SOLVERS, bench.EQUAL_TIME}
        assert all(len(s["dropped"]) == len(s["seconds"]) == 2 for s in result["solvers"].values())
        rows = {row["solver"]: row for row in result["summary"]}
        assert rows["annealing"]["time_ratio_mean"] == rows["annealing"]["dropped_ratio_mean"] == 1
        assert rows["annealing"]["share_better"] == 0
        assert rows["balanced"]["dropped_mean"] < rows["contiguous"]["dropped_mean"]
        assert result["machine"]["cores"] >= 1
    page = out.with_suffix(".md").read_text()
    assert page.count("| balanced |") == 2
    assert "--switched-off mean" in page


def test_synthetic_experts_have_the_tails_of_trained_ones(bench: ModuleType) -> None:
    impact = bench.synthetic_impact(500, 256, (0, 1))
    assert impact.shape == (500, 256)
    assert impact.dtype == np.float32
    assert 3 < impact.mean() / np.median(impact) < 5
    assert 10 < np.quantile(impact, 0.99) / impact.mean() < 15
    assert np.array_equal(impact, bench.synthetic_impact(500, 256, (0, 1)))
    assert not np.array_equal(impact, bench.synthetic_impact(500, 256, (0, 2)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "somewhere"], "--model needs --text"),
        (["--synthetic", "toy", "--experts", "0"], "--experts must be 1 or more, got 0"),
        (["--synthetic", "toy", "--switched-off", "-1"], "switched-off"),
    ],
)
def test_bad_arguments_exit_with_2(
    bench: ModuleType, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        bench.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_an_impossible_problem_is_reported_without_output(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "solvers.json"
    assert bench.main(["--synthetic", "toy", "--switched-off", "4", "--out", str(out)]) == 2
    assert "switched_off must be in 1..3" in capsys.readouterr().err
    assert not out.exists()

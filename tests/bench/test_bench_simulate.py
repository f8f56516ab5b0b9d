"""Policies side by side: loads as multiples of a capacity, one JSON shape, tables and pictures from it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from moe_prism.bench.loads import SATURATION, Plan, capacity, saturating
from moe_prism.bench.plots import write_plots
from moe_prism.bench.results import curves, kl_of, write_results
from moe_prism.bench.scenario import Scenario, run_simulation
from moe_prism.bench.tables import ablation_table, load_tables
from moe_prism.checkpoint.schema import parse_operating_points
from moe_prism.errors import PrismError
from moe_prism.scheduling import POLICIES, Admission, CostModel, Limits
from moe_prism.scheduling.cost_file import write_cost_model
from moe_prism.scheduling.cost_fit import fit_held_out
from moe_prism.scheduling.step_load import TERMS
from moe_prism.scheduling.workloads import Mix, Trace

FULL, SUB_EXPERTS = 64, 512
SECONDS = {"step": 0.01, "prefill_tokens": 2e-4, "prefill_work": 6e-4, "decode_tokens": 5e-4, "decode_work": 2e-3}
COST = CostModel(tuple(SECONDS.get(term, 0.0) for term in TERMS), FULL, SUB_EXPERTS, engine="made up")
POINTS = Path(__file__).parents[2] / "docs" / "results" / "demo" / "operating_points.json"


@pytest.fixture
def cost_file(tmp_path: Path) -> Path:
    write_cost_model(tmp_path / "cost.json", COST)
    return tmp_path / "cost.json"


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    lines = [f"2023-11-16 18:15:{i // 2:02}.{5 * (i % 2)}000000,{rng.integers(100, 900)},{rng.integers(50, 400)}"
             for i in range(80)]  # fmt: skip
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    return path


def test_capacity_is_what_full_budget_sustains() -> None:
    mix, limits = Mix(FULL), Limits(FULL, 16)
    lengths = [(50, 20)]
    rate = capacity(lengths, mix, COST, Admission(COST, limits), 3, 0)
    # by hand: every request takes its prompt, and a sixteenth of each of its 19 steps in full batches of 16
    prompt = 50 * (2e-4 + 6e-4)
    each = prompt + 19 * (5e-4 + 2e-3) + 20 * 0.01 / 16
    assert rate == pytest.approx(3 / each, rel=0.1)
    jobs = saturating(lengths, mix, 0)
    assert len(jobs) == SATURATION
    assert {(job.request.arrival, job.request.ttft_ms, job.request.tpot_ms) for job in jobs} == {(0.0, None, None)}


def test_loads_are_multiples_of_the_capacity() -> None:
    trace = Trace([0.0, 1.0, 5.0, 9.0], [5, 6, 7, 8], [1, 2, 3, 4])
    plan = Plan(Mix(FULL), [(10, 5)], {"low": 0.5, "high": 2.0}, 100.0, trace, 1.5)
    low, high, replay = plan.build(10.0, 4.0)
    assert len(low.jobs) == pytest.approx(500, abs=100)
    assert len(high.jobs) == pytest.approx(2000, abs=200)
    assert [j.request.arrival for j in replay.jobs] == pytest.approx([at * 4 / 6 / 9 for at in trace.arrivals])
    assert [(j.request.prompt_tokens, j.output_tokens) for j in replay.jobs] == [(5, 1), (6, 2), (7, 3), (8, 4)]
    assert (low.share, replay.name, replay.share) == (0.5, "trace", 1.5)


def test_a_comparison_from_files_to_tables_and_pictures(cost_file: Path, trace_file: Path, tmp_path: Path) -> None:
    scenario = Scenario(
        cost=cost_file, points=POINTS, trace=trace_file, loads={"low": 0.2, "high": 1.5}, seconds=8, max_running=16
    )
    told: list[tuple[str, int, int]] = []
    record, model = run_simulation(scenario, lambda *args: told.append(args))
    assert model == COST
    assert record["simulated"] is True
    assert list(record["loads"]) == ["low", "high", "trace"]
    assert told[-1] == ("trace, virtual-queues", 80, 80)
    for load in record["loads"].values():
        assert set(load["policies"]) == set(POLICIES)
        for row in load["policies"].values():
            assert row["finished"] == row["requests"] == load["requests"]
            assert row["floor_violations"] == 0
            for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
                assert row[name]["p50"] <= row[name]["p90"] <= row[name]["p99"]
            assert 0 <= row["goodput_rps"] <= row["throughput_rps"]
            assert row["mean_kl"] >= 0
    assert record["loads"]["low"]["policies"]["continuous"]["mean_kl"] == 0
    high = record["loads"]["high"]["policies"]
    assert high["continuous"]["mean_k"] < high["system-only"]["mean_k"] == high["fifo-original"]["mean_k"] == FULL
    again, _ = run_simulation(replace(scenario, policies=["fifo"]))
    for name, load in again["loads"].items():  # the seed decides
        assert load["policies"]["fifo"] == record["loads"][name]["policies"]["fifo"]
    write_results(tmp_path / "out" / "simulate.json", record)
    stored = json.loads((tmp_path / "out" / "simulate.json").read_text())
    assert stored["loads"]["high"]["policies"]["continuous"] == high["continuous"]
    console = Console(width=80, record=True, file=None, quiet=False)
    with console.capture() as printed:
        for table in [*load_tables(stored), ablation_table(stored)]:
            console.print(table)
    text = printed.get()
    assert text.count("(simulated)") == 4
    assert "…" not in text  # everything fits
    assert text.count("requests below their floor: 0") == 4
    for word in ("continuous", "virtual-queues", "neither", "model only", "system only", "both"):
        assert word in text
    pictures = write_plots(tmp_path / "plots", stored, model)
    assert [p.name for p in pictures] == ["policies.png", "curves.png", "ablation.png"]
    first = [p.read_bytes() for p in pictures]
    assert all(content.startswith(b"\x89PNG") and len(content) > 5000 for content in first)
    assert [p.read_bytes() for p in write_plots(tmp_path / "plots", stored, model)] == first


def test_without_the_ablations_policies_there_is_no_ablation(cost_file: Path, tmp_path: Path) -> None:
    record, _ = run_simulation(Scenario(cost=cost_file, policies=["fifo"], loads={"low": 0.2}, seconds=5))
    assert ablation_table(record) is None
    assert "mean_kl" not in record["loads"]["low"]["policies"]["fifo"]
    assert load_tables(record)[0].row_count == 1
    assert [p.name for p in write_plots(tmp_path, record, COST)] == ["policies.png", "curves.png"]


def test_measured_steps_are_drawn_against_predictions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    loads = [
        COST.load(rng.integers(1, FULL, n), 0.0, [int(p)], [int(FULL / 2)]) for n, p in rng.integers(1, 60, (40, 2))
    ]
    seconds = [COST.seconds(load) * rng.uniform(0.9, 1.1) for load in loads]
    model = fit_held_out(loads, seconds, full_budget=FULL, sub_experts=SUB_EXPERTS)
    record = {"simulated": False, "loads": {}, "curves": curves(model, 0.0)}
    pictures = write_plots(tmp_path, record, model)
    assert [p.name for p in pictures] == ["policies.png", "curves.png", "cost_model.png"]
    assert pictures[-1].stat().st_size > 5000


def test_curves_are_the_cost_models_table() -> None:
    for point in curves(COST, 30.0):
        seconds = COST.table(point["batch"], point["k_active"], 30.0)
        assert (point["step_ms"], point["tokens_per_s"]) == (seconds * 1e3, point["batch"] / seconds)
    assert {point["k_active"] for point in curves(COST, 0.0)} == {8, 16, 32, 48, 64}


def test_kl_comes_from_the_operating_points() -> None:
    points = parse_operating_points(POINTS.read_bytes())
    kl = kl_of(points)
    assert kl[FULL] == 0
    assert all(kl[p.k_active] == max(0.0, p.kl) for p in points.elastic if p.k_active < FULL)
    assert kl_of(None) is None


def test_nan_becomes_null(tmp_path: Path) -> None:
    write_results(tmp_path / "a.json", {"x": math.nan, "y": [1.5, (math.inf, "s")], "z": None})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [1.5, [None, "s"]], "z": None}
    (tmp_path / "file").write_text("")
    with pytest.raises(PrismError, match="results cannot be written"):
        write_results(tmp_path / "file" / "b.json", {})
    with pytest.raises(PrismError, match="plots cannot be written"):
        write_plots(tmp_path / "file" / "c", {"simulated": True, "loads": {}, "curves": curves(COST, 0.0)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cost": None}, "needs a cost model"),
        ({"cost": Path("nowhere.json")}, "cannot be read"),
        ({"points": Path("nowhere.json")}, "cannot be read"),
        ({"trace": Path("nowhere.csv")}, "cannot be read"),
        ({"policies": ["best"]}, "unknown policy 'best'; known: continuous"),
        ({"loads": {"high": 0.0}}, "load high must be above 0"),
        ({"trace_load": -1.0}, "load trace must be above 0"),
        ({"seconds": 0.0}, "seconds must be above 0"),
        ({"floors": ((2.0,), (1.0,))}, "shares of full budget"),
        ({"max_running": 0}, "max_running must be 1 or more"),
        ({"replicas": 0}, "replicas and repeat must be 1 or more"),
        ({"lanes": (9, 3)}, "lanes must be ascending"),
        ({"ttft_ms": -5.0}, "ttft_ms must be above 0"),
        ({"memory_tokens": 20}, "needs memory for"),
    ],
)
def test_impossible_scenarios(changes: dict, message: str, cost_file: Path) -> None:
    fields = {"cost": cost_file, "loads": {"low": 0.2}, "seconds": 5.0} | changes
    with pytest.raises(PrismError, match=message):
        run_simulation(Scenario(**fields))


def test_points_and_cost_model_must_be_of_one_model(tmp_path: Path) -> None:
    other = CostModel(COST.coefficients, 32, SUB_EXPERTS)
    write_cost_model(tmp_path / "other.json", other)
    with pytest.raises(PrismError, match="full budget 64, the cost model of one with 32"):
        run_simulation(Scenario(cost=tmp_path / "other.json", points=POINTS))

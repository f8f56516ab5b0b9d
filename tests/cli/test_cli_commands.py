"""The commands as a user runs them: a process, its exit code, what it prints and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from making import WORDS, save_stock
from safetensors.torch import load_file

from moe_prism.evaluation.kept import Kept

COMMANDS = ("refactor", "sweep", "generate", "inspect", "restore", "pack", "plan", "demo", "simulate", "profile-cost")
SMALL = "num_sub_experts: 4\nsolver: greedy\ngate: static\nneurons: all\ncalibration_tokens: 512\ncontext: 32\n"


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from moe_prism.cli import main; main()", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"COLUMNS": "120", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with stock/, elastic/, second/, recipe.yaml and text.txt."""
    folder = tmp_path_factory.mktemp("made")
    save_stock(folder / "stock", max_position_embeddings=1024)  # as long as what profile-cost measures
    (folder / "recipe.yaml").write_text(SMALL)
    (folder / "text.txt").write_text(WORDS * 100)
    for name, seed in (("elastic", 0), ("second", 1)):
        done = run("refactor", folder / "stock", folder / name, "--recipe", folder / "recipe.yaml", "--seed", seed)
        assert done.returncode == 0, done.stderr
    return folder


def test_help_is_light_and_every_command_shows_an_example() -> None:
    listing = run("--help")
    assert listing.returncode == 0
    assert all(name in listing.stdout for name in COMMANDS)
    for name in COMMANDS:
        assert f"Example: moe-prism {name}" in run(name, "--help").stdout
    heavy = (
        "import sys; import moe_prism.cli.app; "
        "sys.exit(bool({'torch', 'transformers', 'matplotlib', 'scipy', 'numba'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", heavy], timeout=60).returncode == 0


def test_inspect_and_restore(made, tmp_path) -> None:
    summary = json.loads(run("inspect", made / "elastic", "--json").stdout)
    assert "4" in json.dumps(summary)
    assert run("inspect", made / "elastic").returncode == 0
    assert run("restore", made / "elastic", tmp_path / "back").returncode == 0
    original, back = (load_file(p / "model.safetensors") for p in (made / "stock", tmp_path / "back"))
    assert all(torch.equal(original[name], back[name]) for name in original)


def test_generate_streams_at_a_budget(made) -> None:
    full = run("generate", made / "elastic", "--prompt", "the sea", "--max-new-tokens", 8)
    assert full.returncode == 0, full.stderr
    assert full.stdout.startswith("the sea")
    same = run("generate", made / "elastic", "--prompt", "the sea", "--max-new-tokens", 8, "--k-active", 16)
    assert same.stdout == full.stdout
    low = run("generate", made / "elastic", "--prompt", "the sea", "--max-new-tokens", 8, "--k-active", 1)
    assert low.returncode == 0
    assert low.stdout != full.stdout


def test_a_packed_checkpoint_generates_the_same_within_a_memory_and_a_time(made, tmp_path) -> None:
    packed, prompt = tmp_path / "packed", ("--prompt", "the sea", "--max-new-tokens", 8)
    done = run("pack", made / "elastic", packed, "--shadow-bits", 4)
    assert "and a copy of each at 4 bits" in done.stdout, done.stderr
    full = run("generate", made / "elastic", *prompt)
    within = run("generate", packed, *prompt, "--memory", "6GB")
    assert within.stdout == full.stdout, within.stderr
    assert "found in memory" in within.stderr
    stored = run("generate", packed, *prompt, "--memory", "6GB", "--k-stored", 16)
    assert stored.stdout == full.stdout, stored.stderr  # all of the budget runs as stored
    timed = run("generate", packed, *prompt, "--memory", "6GB", "--tpot-ms", 0.001, "--k-min", 2)
    assert timed.returncode == 0
    assert "mean budget" in timed.stderr
    planned = run(
        "plan",
        packed,
        "--memory",
        "6GB",
        "--text",
        made / "text.txt",
        "--tokens",
        64,
        "--budgets",
        "4,16",
        "--k-stored",
        2,
    )
    assert planned.returncode == 0, planned.stderr
    assert "64 of 64 blocks fit" in planned.stdout
    assert "not measured" in planned.stdout


def test_sweep_prints_writes_json_and_completes_the_checkpoint(made, tmp_path) -> None:
    done = run(
        *("sweep", made / "elastic", "--text", made / "text.txt", "--second-text", made / "text.txt"),
        *("--second", made / "second", "--reference", made / "stock", "--tokens", 256, "--context", 32),
        *("--json", tmp_path / "points.json", "--report", tmp_path / "report", "--phases", "4,8"),
    )
    assert done.returncode == 0, done.stderr
    points = json.loads((tmp_path / "points.json").read_text())
    assert [p["k_active"] for p in points["elastic"]] == list(range(1, 17))
    assert [p["k"] for p in points["baseline"]] == [1, 2, 3, 4]
    assert points["full_budget_max_logit_diff"] <= 1e-4
    assert [(p["prefill"], p["decode"]) for p in points["phases"]["points"]][:4] == [(4, 4), (4, 8), (4, 16), (8, 4)]
    assert "after prompts of 16" in done.stdout
    assert points["distinct_stable"]["elastic"] is not None
    assert (tmp_path / "report" / "index.html").stat().st_size > 10_000
    assert json.loads((made / "elastic/moe_prism/operating_points.json").read_text()) == points
    assert (made / "elastic/moe_prism/frontier.png").exists()
    assert run("inspect", made / "elastic").returncode == 0  # checksums are up to date


def test_some_budgets_without_any_text(made, tmp_path) -> None:
    before = (made / "second" / "SHA256SUMS").read_bytes()
    done = run(
        *("sweep", made / "second", "--budgets", "4,8", "--tokens", 128, "--context", 32),
        *("--json", tmp_path / "points.json"),
    )
    assert done.returncode == 0, done.stderr
    points = json.loads((tmp_path / "points.json").read_text())
    assert [p["k_active"] for p in points["elastic"]] == [4, 8]
    assert points["text"] == "sampled-by-the-model/seed-1.txt"
    assert (made / "second" / "SHA256SUMS").read_bytes() == before  # a partial sweep is not the checkpoint's


INTERRUPTED = """
import os, signal
from moe_prism.cli import main
from moe_prism.evaluation.kept import Kept
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell is born deaf to it
write = Kept.write
def interrupted(*arguments):
    write(*arguments)
    os.kill(os.getpid(), signal.SIGINT)
Kept.write = staticmethod(interrupted)
main()
"""


def test_an_interrupted_sweep_goes_on(made, tmp_path) -> None:
    kept = made / "second.sweep"
    command = (
        *("sweep", made / "second", "--budgets", "4,8", "--text", made / "text.txt", "--tokens", 1024),
        *("--context", 32, "--json", tmp_path / "points.json"),
    )
    stopped = subprocess.run([sys.executable, "-c", INTERRUPTED, *map(str, command)], capture_output=True, check=False)
    assert stopped.returncode != 0
    assert not (tmp_path / "points.json").exists()
    (file,) = kept.glob("*.safetensors")
    assert Kept.read(file)[0] == 1
    assert run(*command).returncode == 0
    assert (tmp_path / "points.json").exists()
    assert not kept.exists()


def test_the_demo_on_a_tiny_model(made, tmp_path) -> None:
    recipe = tmp_path / "recipe.yaml"
    plain = (made / "recipe.yaml").read_text()
    recipe.write_text(plain + "\nsolver: importance\ngate: static\nneurons: gate-first\ncompensation_budgets: 2\n")
    args = ("demo", "--model", made / "stock", "--out", tmp_path / "demo", "--recipe", recipe, "--tokens", 512)
    done = run(*args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("old captain") == 3  # the tiny vocabulary has no capital letter
    points = json.loads((tmp_path / "demo" / "report" / "operating_points.json").read_text())
    assert set(points["paper_gates"]) == {"paper: proxy", "paper: linear"}
    assert points["distinct_stable"]["baseline"] is not None
    assert sorted(p.name for p in (tmp_path / "demo").iterdir()) == ["elastic", "report"]


def test_simulate_from_a_checkpoints_cost_model(made, tmp_path) -> None:
    import shutil

    from moe_prism.checkpoint.read import open_checkpoint
    from moe_prism.scheduling import CostModel
    from moe_prism.scheduling.cost_file import save_cost_model
    from moe_prism.scheduling.step_load import TERMS

    copy = tmp_path / "elastic"
    shutil.copytree(made / "elastic", copy)
    checkpoint = open_checkpoint(copy)
    full = checkpoint.elastic.full_budget
    save_cost_model(checkpoint, CostModel((1e-3,) * len(TERMS), full, 64, checkpoint=checkpoint.fingerprint()))
    done = run(
        *("simulate", copy, "--seconds", 5, "--loads", "high=2", "--policies", "continuous,fifo-original"),
        *("--json", tmp_path / "out" / "s.json", "--plots", tmp_path / "plots"),
    )
    assert done.returncode == 0, done.stderr
    assert "fifo-original" in done.stdout
    policies = json.loads((tmp_path / "out" / "s.json").read_text())["loads"]["high"]["policies"]
    assert policies.keys() == {"continuous", "fifo-original"}
    assert (tmp_path / "plots" / "policies.png").exists()
    assert run("inspect", copy).returncode == 0  # checksums are right with a cost model in it


def test_profile_cost_and_bench_schedule(made, tmp_path) -> None:
    import shutil

    copy = tmp_path / "elastic"
    shutil.copytree(made / "elastic", copy)
    done = run("profile-cost", copy, "--max-batch", 1, "--repeats", 1, "--json", tmp_path / "cost.json")
    assert done.returncode == 0, done.stderr
    assert "held-out error" in done.stdout
    assert json.loads((tmp_path / "cost.json").read_text()) == json.loads(
        (copy / "moe_prism" / "cost_model.json").read_text()
    )
    record = tmp_path / "schedule.json"
    done = run(
        *("bench", "schedule", copy, "--loads", "low=1,high=2", "--seconds", 0.5, "--max-running", 2),
        *("--policies", "continuous,fifo-original@high", "--json", record, "--plots", tmp_path / "plots"),
    )
    assert done.returncode == 0, done.stderr
    assert "high_throughput_ratio" in done.stdout
    loads = json.loads(record.read_text())["loads"]
    assert {name: list(load["policies"]) for name, load in loads.items()} == {
        "low": ["continuous"],
        "high": ["continuous", "fifo-original"],
    }
    assert (tmp_path / "plots" / "policies.png").exists()
    assert not list(tmp_path.glob(".elastic.*"))  # nothing of what an interruption would have left


def altered(made: Path, tmp_path: Path, name: str, how: str) -> Path:
    import shutil

    out = tmp_path / "copy"
    shutil.copytree(made / "elastic", out)
    file = out / name
    data = bytearray(file.read_bytes())
    if how == "truncated":
        data = data[:-100]
    else:
        data[-1] ^= 1
    file.write_bytes(bytes(data))
    return out


@pytest.mark.parametrize("how", ["truncated", "altered"])
def test_a_damaged_file_is_named(how: str, made, tmp_path) -> None:
    done = run("generate", altered(made, tmp_path, "model.safetensors", how), "--prompt", "the sea")
    assert done.returncode == 2
    assert "model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def bad_calls(made: Path, tmp_path: Path) -> dict[str, tuple[tuple[object, ...], str]]:
    future = tmp_path / "future"
    future.mkdir()
    config = json.loads((made / "elastic" / "config.json").read_text())
    config["moe_prism"]["version"] = 7
    (future / "config.json").write_text(json.dumps(config))
    return {
        "budget": (("generate", made / "elastic", "--prompt", "a", "--k-active", 17), "from 1 to 16"),
        "stock": (("generate", made / "stock", "--prompt", "a"), "moe-prism refactor"),
        "no directory": (("inspect", tmp_path / "nowhere"), "nowhere"),
        "future": (("inspect", future), "version 7"),
        "taken": (("refactor", made / "stock", made / "elastic"), "not empty"),
        "divides": (("refactor", made / "stock", tmp_path / "o", "-n", 5), "must divide the 16 neurons"),
        "recipe": (("refactor", made / "stock", tmp_path / "o", "--recipe", made / "text.txt"), "mapping"),
        "budgets": (("sweep", made / "elastic", "--budgets", "4,x"), "4,x"),
        "budget 99": (("sweep", made / "elastic", "--budgets", "99", "--text", made / "text.txt"), "99"),
        "no memory": (("generate", made / "elastic", "--prompt", "a", "--tpot-ms", 5), "needs --memory"),
        "stored alone": (("generate", made / "elastic", "--prompt", "a", "--k-stored", 2), "needs --memory"),
        "shadow bits": (("pack", made / "elastic", tmp_path / "p", "--shadow-bits", 3), "0 (no copy) or 4, got 3"),
        "floor alone": (("generate", made / "elastic", "--prompt", "a", "--k-min", 2), "--tpot-ms"),
        "not packed": (("plan", made / "elastic", "--memory", "4GB", "--text", made / "text.txt"), "moe-prism pack"),
        "prompt": (("generate", made / "elastic", "--prompt", ""), "prompt is empty"),
        "demo": (("demo", "--model", tmp_path), "no model at"),
        "no cost model": (("simulate", made / "elastic"), "moe-prism profile-cost"),
        "loads": (("simulate", made / "elastic", "--loads", "high"), "low=0.3,high=1.5"),
        "floors": (("simulate", made / "elastic", "--floors", "a=1"), "0.25=0.4"),
    }


@pytest.mark.parametrize(
    "name",
    [
        *("budget", "stock", "no directory", "future", "taken", "divides"),
        *("no memory", "floor alone", "not packed", "stored alone", "shadow bits"),
        *("recipe", "budgets", "budget 99", "prompt", "demo"),
        *("no cost model", "loads", "floors"),
    ],
)
def test_bad_input_ends_with_one_line_and_code_2(name: str, made, tmp_path) -> None:
    before = sorted(str(p) for p in made.rglob("*"))
    args, message = bad_calls(made, tmp_path)[name]
    done = run(*args)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(str(p) for p in made.rglob("*")) == before
    assert not (tmp_path / "o").exists()

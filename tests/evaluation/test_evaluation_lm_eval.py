"""The lm-eval model: local tasks, equality with lm-eval's own Hugging Face model, discovery by the stock command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_models import write_elastic
from tiny import tiny_model, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install moe-prism[eval]")
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from moe_prism import elastic  # noqa: E402
from moe_prism.errors import PrismError  # noqa: E402
from moe_prism.evaluation import lm_eval_plugin  # noqa: E402
from moe_prism.evaluation.lm_eval_model import MoePrismLM  # noqa: E402

ROOT = Path(__file__).parents[2]
TASKS = Path(__file__).with_name("tasks")
# documents of each task: enough to tell budgets apart, short enough for a test
SAMPLES = {"prism_arc_easy": list(range(12)), "prism_wikitext": list(range(12))}


@pytest.fixture(scope="module")
def original(shared_data: Path) -> Path:
    folder = shared_data / "models" / "starter-16m"
    if not folder.is_dir():
        pytest.skip(f"no trained model at {folder}")
    return folder


@pytest.fixture(scope="module")
def checkpoint(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model made elastic, with a gate fitted on a few hundred tokens of prose."""
    out = tmp_path_factory.mktemp("lm-eval") / "elastic"
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(original)
    text = (TASKS / "prism_arc_easy.yaml").read_text() + (ROOT / "pyproject.toml").read_text()
    write_elastic(model, tokenizer, torch.tensor([tokenizer(text)["input_ids"][:400]]), out)
    return out


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lm-eval-tiny") / "elastic"

    class NoTokenizer:
        def save_pretrained(self, folder: Path) -> None:
            """Nothing: whatever is refused before loading needs none."""

    write_elastic(tiny_model("olmoe"), NoTokenizer(), tokens(8, 32), out)
    return out


@pytest.fixture
def local_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tasks name files relative to the repository's root; nothing is looked up on a hub or cached in a home."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # runs pip and more, for seconds


def results_of(model: HFLM) -> dict[str, dict[str, Any]]:
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    done = lm_eval.simple_evaluate(
        model, tasks=list(SAMPLES), samples=SAMPLES, task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    assert done is not None
    return {task: {k: v for k, v in done["results"][task].items() if isinstance(v, float)} for task in SAMPLES}


@pytest.mark.usefixtures("local_only")
def test_full_budget_equals_the_original_and_a_low_budget_does_not(original: Path, checkpoint: Path) -> None:
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "batch_size": 8}
    stock = results_of(HFLM(pretrained=str(original), **options))
    model = MoePrismLM(pretrained=str(checkpoint), **options)
    assert model.k_active == 16
    assert model.get_model_info()["k_active"] == 16
    full = results_of(model)
    assert {"acc,none", "acc_norm,none"} <= full["prism_arc_easy"].keys()
    assert {"word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"} <= full["prism_wikitext"].keys()
    for task, metrics in stock.items():
        assert full[task] == pytest.approx(metrics, rel=1e-5)
    low = results_of(MoePrismLM(pretrained=str(checkpoint), k_active=1, verify=False, **options))
    assert low["prism_wikitext"]["bits_per_byte,none"] > full["prism_wikitext"]["bits_per_byte,none"] * 1.05


def entry_points() -> dict[str, dict[str, str]]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        found: dict[str, dict[str, str]] = tomllib.load(file)["project"]["entry-points"]
    return found


def test_stock_command_finds_the_model(checkpoint: Path, tmp_path: Path) -> None:
    """``lm_eval --model moe_prism``, with nothing but the project's entry points, as an installation has them."""
    installed = tmp_path / "site" / "moe_prism_entry_points-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: moe-prism-entry-points\nVersion: 1\n")
    lines = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in members.items())
        for group, members in entry_points().items()
    ]
    (installed / "entry_points.txt").write_text("\n".join(lines))
    # the stock command's own function, spared the index of 14,000 built-in tasks, which takes most of a minute
    stock = (
        "import functools, lm_eval.tasks as t; "
        "t.TaskManager = functools.partial(t.TaskManager, include_defaults=False); "
        "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    )
    command = [sys.executable, "-c", stock, "--model", "moe_prism", "--tasks", "prism_arc_easy", "--limit", "2"]
    command += ["--model_args", f"pretrained={checkpoint},k_active=8,dtype=float32", "--device", "cpu"]
    command += ["--include_path", str(TASKS), "--output_path", str(tmp_path / "out")]
    path = os.pathsep.join([str(installed.parent), str(ROOT)])
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **offline}, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "out").rglob("results_*.json")
    result = json.loads(written.read_text())
    assert result["results"]["prism_arc_easy"]["acc,none"] in (0, 0.5, 1)
    assert result["config"]["k_active"] == 8
    assert result["config"]["full_budget"] == 16


def test_entry_points_name_what_exists() -> None:
    declared = entry_points()
    assert declared["torch.backends"].popitem()[1] == "moe_prism.evaluation.lm_eval_plugin:register"
    assert declared["lm_eval.models"] == {lm_eval_plugin.NAME: lm_eval_plugin.TARGET}
    assert f"{MoePrismLM.__module__}:{MoePrismLM.__name__}" == lm_eval_plugin.TARGET


def test_hook_adds_the_name_once_and_keeps_lm_evals_own() -> None:
    code = (
        "import lm_eval\n"
        "from moe_prism.evaluation.lm_eval_plugin import register\n"
        "from lm_eval.api.registry import model_registry\n"
        "register(); register()\n"
        "import sys; assert 'torch' not in sys.modules\n"
        "assert {'hf', 'vllm', 'moe_prism'} <= set(model_registry)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_hook_never_breaks_the_import_of_torch() -> None:
    code = (
        "import sys, types\n"
        "from moe_prism.evaluation.lm_eval_plugin import register\n"
        "register(); assert 'lm_eval' not in sys.modules\n"  # other programs pay nothing
        "sys.modules['lm_eval'] = types.ModuleType('lm_eval')\n"  # a version without a registry
        "register()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert "not available in this lm-eval" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_active": 0}, r"k_active must be a whole number in 1\.\.16 .*got 0"),
        ({"k_active": 17}, r"1\.\.16 .*got 17"),
        ({"k_active": "half"}, r"1\.\.16 .*got 'half'"),
        ({"dtype": "float31"}, "dtype 'float31'"),
        ({"peft": "adapter"}, "no argument peft"),
        ({"kactive": 3}, "no argument kactive"),
    ],
)
def test_bad_arguments_are_refused_before_loading(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    def never(*_: object, **__: object) -> None:
        pytest.fail("loading was started")

    monkeypatch.setattr(elastic, "load_elastic", never)
    monkeypatch.setattr(HFLM, "_get_config", never)
    with pytest.raises(PrismError, match=message):
        MoePrismLM(pretrained=str(tiny_checkpoint), **options)


def test_a_stock_model_is_refused(tmp_path: Path) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path)
    with pytest.raises(PrismError, match="moe-prism refactor"):
        MoePrismLM(pretrained=str(tmp_path), k_active=2)

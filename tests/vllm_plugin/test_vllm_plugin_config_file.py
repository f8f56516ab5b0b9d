from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from making import recipe, save_stock
from typer.testing import CliRunner

from moe_prism import make_elastic
from moe_prism.cli.app import app
from moe_prism.errors import PrismError
from moe_prism.vllm_plugin.setup import Options


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    make_elastic(save_stock(folder / "stock"), folder / "elastic", recipe())
    return folder / "elastic"


def test_the_file_names_both_halves(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "vllm.yaml"
    done = CliRunner().invoke(app, ["vllm-config", str(checkpoint), "--out", str(target), "--k-min", "4"])
    assert done.exit_code == 0, done.output
    assert yaml.safe_load(target.read_text()) == {
        "model": str(checkpoint),
        "served-model-name": "elastic",
        "worker-cls": "moe_prism.vllm_plugin.worker.ElasticWorker",
        "scheduler-cls": "moe_prism.vllm_plugin.scheduler.ElasticScheduler",
        "additional-config": {"moe_prism": {"k_min": 4}},
    }
    printed = CliRunner().invoke(app, ["vllm-config", str(checkpoint), "--k-min", "4"])
    assert yaml.safe_load(printed.output) == yaml.safe_load(target.read_text())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--k-min", "17"], "k_min must be from 1 to 16"),
        (["--policy", "best"], "unknown policy 'best'"),
        (["--out", "vllm.json"], "must end in .yaml"),
        (["--cost-model", "nowhere.json"], "nowhere.json cannot be read"),
    ],
)
def test_bad_options_are_named(checkpoint: Path, more: list[str], words: str) -> None:
    done = CliRunner().invoke(app, ["vllm-config", str(checkpoint), *more])
    assert isinstance(done.exception, PrismError)
    assert words in str(done.exception)


def test_a_family_without_budgets_in_vllm_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "architectures": ["PhimoeForCausalLM"]}))
    done = CliRunner().invoke(app, ["vllm-config", str(other)])
    assert "PhimoeForCausalLM has no budgets in vLLM" in str(done.exception)
    assert "moe-prism serve" in str(done.exception)


def test_options_of_a_server_are_checked() -> None:
    assert Options.of({}) == Options()
    assert Options.of({"moe_prism": {"policy": "fifo", "k_min": 3}}) == Options("fifo", 3)
    for given, words in (
        ({"moe_prism": {"speed": 1}}, "no key speed; known: policy, k_min"),
        ({"moe_prism": {"policy": "best"}}, "unknown policy"),
        ({"moe_prism": 3}, "must be an object"),
    ):
        with pytest.raises(PrismError, match=words):
            Options.of(given)

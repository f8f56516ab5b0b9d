from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from making import recipe, save_stock
from tiny import tokens
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moe_prism import make_elastic
from moe_prism.cli.app import app
from moe_prism.elastic import routed_experts
from moe_prism.errors import PrismError, UnsupportedModelError
from moe_prism.refactor.export import export_fine_grained


def checkpoint(
    folder: Path, family: str, gate: str = "linear", model: dict[str, object] | None = None, n: int = 4
) -> Path:
    stock = save_stock(folder / "stock", family, **(model or {}))
    make_elastic(stock, folder / "elastic", recipe(gate=gate, num_sub_experts=n))
    return folder / "elastic"


def run(path: Path, **how: object) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **how)
    with torch.no_grad():
        return model(tokens()).logits.log_softmax(-1)


@pytest.mark.parametrize("gate", ["linear", "static"])
@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_full_budget_is_the_original(family: str, gate: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, family, gate)
    done = export_fine_grained(path, tmp_path / "fine")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "stock").config
    fine = json.loads((tmp_path / "fine" / "config.json").read_text())
    assert done.k_active == fine["num_experts_per_tok"] == 4 * original.num_experts_per_tok
    assert done.num_experts == 4 * getattr(original, "num_experts", getattr(original, "num_local_experts", None))
    assert "moe_prism" not in fine
    assert (tmp_path / "fine" / "tokenizer.json").is_file()
    assert not (tmp_path / "fine" / "moe_prism").exists()
    assert (run(tmp_path / "fine") - run(tmp_path / "stock")).abs().max() <= 1e-5


@pytest.mark.parametrize("renormalise", [False, True])
def test_multiples_of_n_are_fewer_experts(renormalise: bool, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "olmoe", model={"norm_topk_prob": renormalise})
    assert export_fine_grained(path, tmp_path / "fine", k_active=8).renormalises is renormalise
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32)
    with torch.no_grad(), routed_experts(original, 2):
        expected = original(tokens()).logits.log_softmax(-1)
    found = run(tmp_path / "fine")
    assert (found - expected).abs().max() <= 1e-5
    assert (found - run(tmp_path / "stock")).abs().max() > 1e-3


def test_the_dial_is_a_setting_of_the_config(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "olmoe")
    export_fine_grained(path, tmp_path / "full")
    export_fine_grained(path, tmp_path / "six", k_active=6)
    assert torch.equal(run(tmp_path / "full", num_experts_per_tok=6), run(tmp_path / "six"))


@pytest.mark.parametrize(
    ("family", "n", "message"),
    [("deepseek_v3", 4, "deepseek_v3 cannot be exported"), ("gpt_oss", 4, "gpt_oss cannot be exported")],
)
def test_families_that_are_not_exact_are_refused(family: str, n: int, message: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, family, "static", n=n)
    with pytest.raises(UnsupportedModelError, match=message):
        export_fine_grained(path, tmp_path / "fine")
    assert not (tmp_path / "fine").exists()


def test_an_n_that_would_round_weights_is_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "olmoe", model={"intermediate_size": 24}, n=3)
    with pytest.raises(UnsupportedModelError, match="power of two"):
        export_fine_grained(path, tmp_path / "fine")


def test_bad_input_is_refused_before_any_work(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "olmoe")
    for k_active in (0, 17):
        with pytest.raises(PrismError, match="k_active must be from 1 to 16"):
            export_fine_grained(path, tmp_path / "fine", k_active)
    with pytest.raises(PrismError, match="inside the checkpoint"):
        export_fine_grained(path, path / "fine")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(PrismError, match="taken"):
        export_fine_grained(path, tmp_path / "taken")


def test_the_command(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "mixtral")
    found = CliRunner().invoke(app, ["export", str(path), str(tmp_path / "fine"), "--k-active", "5"])
    assert found.exit_code == 0, found.output
    assert "24 experts, 5 of them" in found.output
    assert "approximate below" in found.output

"""A dense model directory becomes a bed that every tool takes."""

from __future__ import annotations

from pathlib import Path

import dense_bed
import pytest
import torch
from making import save_stock
from tiny import tokens
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moe_prism.experts import find_expert_layers


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["dense_bed.py", *map(str, words)])
    return dense_bed.main()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(save_stock(folder / "stock")).save_pretrained(folder)
    return folder


def test_the_bed_computes_what_the_dense_model_does(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, dense, tmp_path / "bed") == 0
    bed = AutoModelForCausalLM.from_pretrained(tmp_path / "bed")
    assert bed.dtype == torch.bfloat16
    assert find_expert_layers(bed)[0].num_experts == 1
    original = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    with torch.no_grad():
        assert (bed.float()(tokens()).logits - original(tokens()).logits).abs().max() <= 1e-4
    assert (tmp_path / "bed" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("source", "message"),
    [("missing.gguf", "no such file: missing.gguf"), ("empty", "cannot be loaded"), ("moe", "olmoe cannot be viewed")],
)
def test_what_cannot_become_a_bed_leaves_nothing(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    if source == "moe":
        save_stock(Path("moe"))
    assert run(monkeypatch, source, "bed") == 2
    assert message in capsys.readouterr().err
    assert not any(path.name.endswith("bed") for path in tmp_path.iterdir())


def test_an_output_that_exists_is_kept(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert run(monkeypatch, dense, tmp_path) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]

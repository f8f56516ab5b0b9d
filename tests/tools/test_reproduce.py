"""The paper's table on a tiny model: what its columns must equal, its published figures, and going on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import reproduce
from making import WORDS, save_stock

from moe_prism.errors import PrismError
from moe_prism.evaluation.measure import Run, measure
from moe_prism.refactor import load_stock
from moe_prism.refactor.calibration import load_calibration

RECIPE = "num_sub_experts: 8\nsolver: importance\ngate: static\nneurons: gate-first\ncompensation_budgets: 2\n"


def run(stock: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    words = [
        "reproduce.py", str(stock), "--text", str(folder / "text.txt"), "--calibration", str(folder / "text.txt"),
        "--recipe", str(folder / "recipe.yaml"), "--tokens", "520", "--context", "64", "--calibration-tokens", "512",
        "--dtype", "float32", "--out", str(folder / "out"), *more,
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", words)
    return reproduce.main()


def test_the_table_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = save_stock(tmp_path / "OLMoE-1B-7B-0924", num_experts_per_tok=7)  # 28 sub-experts: the paper's K fit
    (tmp_path / "text.txt").write_text(WORDS * 200)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert run(stock, tmp_path, monkeypatch) == 0
    record = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    columns = {column["column"]: column for column in record["columns"]}
    assert list(columns) == [reproduce.ORIGINAL, reproduce.CG, reproduce.LG, reproduce.OURS]
    for column in columns.values():
        assert list(column["cells"]) == ["12", "16", "20", "24"]
        assert column["full"] == pytest.approx(columns[reproduce.ORIGINAL]["full"], rel=1e-6)  # printed figures
    for k, cell in columns[reproduce.LG]["cells"].items():  # the paper: without finetuning LG is top-k'
        assert cell["perplexity"] == pytest.approx(columns[reproduce.ORIGINAL]["cells"][k]["perplexity"], rel=1e-3)
        assert columns[reproduce.OURS]["cells"][k]["cost"] <= int(k) / 28 + 0.0051
    # the first column by transformers alone, with fewer experts in the config
    model, tokenizer = load_stock(str(stock), "float32")
    held = load_calibration(str(tmp_path / "text.txt"), tokenizer, model, 520, 65, 0).windows
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 4
    alone = measure(model, held, [Run("four", None)])["four"].mean_nll
    assert columns[reproduce.ORIGINAL]["cells"]["16"]["perplexity"] == pytest.approx(math.exp(alone), rel=1e-4)
    text = (tmp_path / "out" / "reproduce.md").read_text()
    assert "| 12 |" in text
    assert text.count("15.72 | 14.89 | 15.71") == 1
    assert text.strip() in capsys.readouterr().out
    monkeypatch.setattr(reproduce, "measured", None)  # nothing is left to do
    assert run(stock, tmp_path, monkeypatch) == 0


def test_budgets_that_are_no_whole_experts_are_refused() -> None:
    assert reproduce.budgets_of(None, "someone/OLMoE-1B-7B-0924", 32) == [12, 16, 20, 24]
    assert reproduce.budgets_of(None, "another", 20) == [12, 16]
    for bad in ([13], [32], [0]):
        with pytest.raises(PrismError, match="multiples of 4"):
            reproduce.budgets_of(bad, "another", 32)

"""The table of methods at equal cost, on a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import frontier
import pytest
import torch
from making import WORDS, save_stock
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from moe_prism.experts import dense_as_experts


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stock(tmp_path_factory.mktemp("frontier") / "stock")


def run(stock: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> dict:
    words = [
        "frontier.py", "--model", str(stock), "--calibration", str(folder / "text.txt"), "--text",
        str(folder / "text.txt"), "--tokens", "512", "--calibration-tokens", "512", "--num-sub-experts", "4",
        "--out", str(folder / "out" / "frontier.json"), *more,
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", words)
    assert frontier.main() == 0
    return json.loads((folder / "out" / "frontier.json").read_text())


def test_every_method_is_measured_within_its_cost_and_only_once(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(WORDS * 2000)
    monkeypatch.setitem(frontier.ALL, "gate-first, blocks of 2", frontier.ALL["gate-first"] | {"neuron_block": 2})
    methods = ["paper: proxy", "static", "gate-first, compensated", "gate-first, blocks of 2", "ladder"]
    found = run(stock, tmp_path, monkeypatch, "--seeds", "2", "--methods", *methods)
    rows = found["rows"]
    assert {row["method"] for row in rows} == {
        *methods,
        frontier.ORIGINAL,
        frontier.BASELINE,
        *frontier.ROUNDED.values(),
    }
    assert {row["seed"] for row in rows if row["method"] == "static"} == {0, 1}
    for row in rows:
        assert row["mcq"] is None  # no questions were given
        assert row["excess_nats"] < 5
        assert row["kl"] > -1e-3
        if " at " in row["setting"]:
            read, multiplied = re.findall(r"([0-9.]+) of the", row["setting"])
            assert row["axis"] == "flops" or float(read) <= row["share"] + 0.0051
            assert row["axis"] == "bytes" or float(multiplied) <= row["share"] + 0.0051
    assert {row["axis"] for row in rows if row["method"] == "ladder"} == {"bytes", "flops"}
    assert {row["axis"] for row in rows if row["method"] == "static"} == {"both"}
    table = capsys.readouterr().out
    assert table.count("gate-first, compensated") == 1
    assert table.count("ladder (bytes)") == table.count("ladder (FLOPs)") == 1
    assert (tmp_path / "out" / "frontier.png").stat().st_size > 1000
    monkeypatch.setattr(frontier, "make_elastic", None)  # nothing is left to do
    assert run(stock, tmp_path, monkeypatch, "--seeds", "2", "--methods", *methods) == found


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_keeps_every_group_within_half_a_step(bits: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 5, 64)
    rounded = weight.clone()
    frontier.round_weights(rounded, bits)
    step = weight.view(3, 5, 2, 32).abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((rounded - weight).view(3, 5, 2, 32).abs() <= step / 2 + 1e-6).all()
    for group in rounded.view(-1, 32):
        assert len(group.unique()) <= 2**bits


def test_a_stopped_run_keeps_what_it_had(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(WORDS * 2000)
    real, calls = frontier.method_rows, []

    def dies(*args):
        calls.append(args[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(frontier, "method_rows", dies)
    how = ("--seeds", "1", "--methods", "static", "gate-first")
    with pytest.raises(KeyboardInterrupt):
        run(stock, tmp_path, monkeypatch, *how)
    monkeypatch.setattr(frontier, "method_rows", real)
    rows = run(stock, tmp_path, monkeypatch, *how)["rows"]
    assert calls == ["static", "gate-first"]
    assert sum(row["method"] == "static" for row in rows) == len(frontier.SHARES)


def test_a_dense_bed_is_compared_with_its_static_order_and_questions_are_asked(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    dense_as_experts(LlamaForCausalLM(config)).save_pretrained(tmp_path / "view")
    PreTrainedTokenizerFast.from_pretrained(stock).save_pretrained(tmp_path / "view")
    (tmp_path / "text.txt").write_text(WORDS * 2000)
    line = {"query": "the sea was", "choices": ["calm and the old", "shore ."], "gold": 0}
    (tmp_path / "asked.jsonl").write_text((json.dumps(line) + "\n") * 3)
    methods = ["static", "gate-first"]
    how = ("--seeds", "1", "--methods", *methods, "--mcq", str(tmp_path / "asked.jsonl"), "--questions", "2")
    rows = run(tmp_path / "view", tmp_path, monkeypatch, *how)["rows"]
    assert {row["method"] for row in rows} == {*methods, frontier.ORIGINAL, *frontier.ROUNDED.values()}
    for row in rows:
        assert row["mcq_sets"].keys() == {"asked"}
        assert row["mcq"] in (0, 1)
    by_name = {(row["method"], row["share"]): row for row in rows}
    assert by_name[frontier.ORIGINAL, 1.0]["excess_nats"] == 0
    ratio = by_name["gate-first", 0.5]["excess_nats"] / by_name["static", 0.5]["excess_nats"]
    assert f"({ratio:.2f})" in capsys.readouterr().out


def test_a_text_that_is_not_there_ends_with_a_message(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "sys.argv",
        ["frontier.py", "--model", str(stock), "--calibration", "x", "--text", "none.txt", "--out", "o.json"],
    )
    monkeypatch.chdir(tmp_path)
    assert frontier.main() == 2
    assert "'none.txt' does not exist" in capsys.readouterr().err


def test_finetuning_reads_on_after_the_same_calibration_text(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("".join(f"{WORDS}{number} " for number in range(2000)))
    name = "gate-first, compensated, finetuned"
    how = frontier.ALL[name] | {"finetune": {"steps": 2, "batch": 2}}
    monkeypatch.setitem(frontier.ALL, name, how)
    texts = []
    real = frontier.make_elastic
    monkeypatch.setattr(
        frontier, "make_elastic", lambda *a, text, **k: texts.append(Path(text).read_text()) or real(*a, text=text, **k)
    )
    rows = run(stock, tmp_path, monkeypatch, "--seeds", "2", "--methods", "gate-first, compensated", name)["rows"]
    assert {row["seed"] for row in rows if row["method"] == name} == {0, 1}
    plain, trained = texts[::2], texts[1::2]  # method by method, seed by seed
    for calibration, longer in zip(plain, trained, strict=True):
        assert longer.startswith(calibration)
    rests = [longer[len(calibration) :] for calibration, longer in zip(plain, trained, strict=True)]
    assert all(rests)
    assert rests[0][:200] not in rests[1]

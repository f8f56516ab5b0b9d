"""The exported directory: parity with transformers, scores, tokenizer, card, and what is refused."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import train_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_samples import OPTIONS, SIZES, Trained
from reference_training.card import read_log, thin
from reference_training.data import END_OF_TEXT
from reference_training.export import (
    LogitsModel,
    check_output,
    evaluate,
    load_flat,
    logit_difference,
    read_start,
    to_transformers,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase


def test_transformers_computes_the_training_codes_logits(trained: Trained) -> None:
    model, step = load_flat(trained.workdir / "weights-100.pt", SIZES)
    assert step == 40
    tokens = torch.randint(SIZES.vocab_size, (3, 33), generator=torch.Generator().manual_seed(0))
    hf_model = to_transformers(model, balance_loss=0.01)
    with torch.no_grad():
        ours, theirs = model.logits(tokens), hf_model(tokens[:, :-1]).logits
    assert ours.shape == theirs.shape == (3, 32, SIZES.vocab_size)
    assert (ours - theirs).abs().max() <= 1e-4
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    assert logit_difference(model, hf_model, tokens) == pytest.approx(float((ours - theirs).abs().max()), abs=1e-6)


def test_renormalised_routing_weights_and_other_sizes_are_exported_too() -> None:
    torch.manual_seed(0)
    config = replace(SIZES, experts=6, neurons=24, top_k=3, norm_topk_prob=True)
    model = LogitsModel(config, 5, torch.device("cpu"))
    with torch.no_grad():
        for name, part in model.named(model.flat).items():
            if ".mlp." in name:
                part.mul_(5)  # new weights are so small that routing hardly matters
    tokens = torch.randint(0, SIZES.vocab_size, (3, 33))
    hf_model = to_transformers(model, balance_loss=0.01)
    assert logit_difference(model, hf_model, tokens) <= 1e-4
    for layer in hf_model.model.layers:
        layer.mlp.gate.norm_topk_prob = False
    with pytest.raises(SystemExit, match="differ by"):
        logit_difference(model, hf_model, tokens)


def test_a_wrong_conversion_is_noticed(trained: Trained) -> None:
    model, _ = load_flat(trained.workdir / "weights-100.pt", SIZES)
    hf_model = to_transformers(model, balance_loss=0.01)
    with torch.no_grad():
        experts = hf_model.model.layers[1].mlp.experts.gate_up_proj
        experts.copy_(experts.roll(SIZES.neurons, dims=1))  # gate and up in each other's place
    with pytest.raises(SystemExit, match="differ by"):
        logit_difference(model, hf_model, torch.arange(66).view(2, 33))


def test_plain_transformers_loads_the_export(trained: Trained) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(trained.out, dtype="auto")
    assert loaded.config.model_type == "olmoe"
    assert loaded.config.norm_topk_prob is False
    assert loaded.dtype == torch.bfloat16
    model, _ = load_flat(trained.workdir / "weights-100.pt", SIZES)
    expected = model.named(model.flat.detach())
    stored = dict(loaded.named_parameters())
    assert set(stored) == set(expected)  # the tied head is no parameter of its own
    for name, tensor in expected.items():
        assert torch.equal(stored[name], tensor.to(torch.bfloat16)), name
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_the_score_of_a_model_without_opinion_is_log_of_the_vocabulary(trained: Trained, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained.out)
    tokenizer = AutoTokenizer.from_pretrained(trained.out)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = trained.held_out.read_text()
    score = evaluate(tmp_path, text)
    n_tokens = len(tokenizer(text)["input_ids"])
    assert score.tokens == (n_tokens - 1) // 256 * 256
    assert score.nll == pytest.approx(math.log(SIZES.vocab_size), abs=1e-4)
    assert score.ppl == pytest.approx(SIZES.vocab_size, abs=0.05)
    bits = math.log2(SIZES.vocab_size) * (n_tokens - 1) / len(text.encode())
    assert score.bits_per_byte == pytest.approx(bits, abs=1e-4)


def test_scores_of_the_trained_model_beat_chance(trained: Trained) -> None:
    scores = json.loads((trained.out / "eval.json").read_text())
    (name,) = scores
    assert "held_out.txt" in name
    assert scores[name]["nll"] < 0.75 * math.log(SIZES.vocab_size)
    assert vars(evaluate(trained.out, trained.held_out.read_text())) == scores[name]


@pytest.fixture(scope="module")
def tokenizer(trained: Trained) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(trained.out)
    return loaded


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60).filter(lambda text: END_OF_TEXT not in text))
def test_the_tokenizer_gives_back_every_byte(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer(text, verbose=False)["input_ids"]
    assert all(0 < i < SIZES.vocab_size for i in ids)  # 0 is the end of text
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_card_states_the_run(trained: Trained) -> None:
    card = (trained.out / "README.md").read_text()
    score = next(iter(json.loads((trained.out / "eval.json").read_text()).values()))
    for fact in ("10,240 tokens (40 steps", "Sentences of a toy grammar.", "seed 0", f"{score['bits_per_byte']:.4f}"):
        assert fact in card
    assert (trained.out / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    assert len((trained.out / "training_log.jsonl").read_text().splitlines()) == 3


def test_the_cards_command_repeats_the_run(trained: Trained) -> None:
    card = (trained.out / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if line.startswith("python tools/train_reference.py")]
    parser = train_reference.build_parser()
    again = vars(parser.parse_args(shlex.split(line)[2:]))
    first = vars(parser.parse_args([str(trained.text), *OPTIONS, "--workdir", "DIR", "--out", "DIR"]))
    assert (Path(train_reference.__file__).parents[1] / again.pop("text")[0]).resolve() == first.pop("text")[
        0
    ].resolve()
    del again["workers"], first["workers"]  # a matter of the machine
    assert again == first


def test_a_snapshot_replaces_an_earlier_export(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "model"
    command = [str(trained.text), *OPTIONS, "--workdir", str(trained.workdir), "--out", str(out)]
    train_reference.main([*command, "--export-only", "100"])
    train_reference.main([*command, "--export-only", "010", "--compare", str(trained.out)])
    assert [p.name for p in tmp_path.iterdir()] == ["model"]  # nothing temporary is left
    assert "(4 steps" in (out / "README.md").read_text()
    early = AutoModelForCausalLM.from_pretrained(out).get_input_embeddings().weight
    late = AutoModelForCausalLM.from_pretrained(trained.out).get_input_embeddings().weight
    assert not torch.equal(early, late)


def test_a_failed_export_leaves_the_earlier_one(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (out / "eval.json").write_text("{}")

    def no_space(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("reference_training.export.save_curve", no_space)
    command = [str(trained.text), *OPTIONS, "--workdir", str(trained.workdir), "--out", str(out)]
    with pytest.raises(OSError, match="no space"):
        train_reference.main([*command, "--export-only", "100"])
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (out / "eval.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--export-only", "030", "--workdir", "nowhere"], "nowhere is not the directory of a training run"),
        (["--export-only", "030", "--neurons", "24"], "give the size options"),
        (["--export-only", "030", "--eval", "absent.txt"], "no such text file: absent.txt"),
        (["--export-only", "030", "--compare", "absent"], "absent is not a model directory"),
    ],
)
def test_bad_requests_are_refused(trained: Trained, tmp_path: Path, extra: list[str], message: str) -> None:
    command = [str(trained.text), *OPTIONS, "--workdir", str(trained.workdir), "--out", str(tmp_path / "model")]
    with pytest.raises(SystemExit, match=message):
        train_reference.main([*command, *extra])
    assert not any(tmp_path.iterdir())


def test_a_missing_snapshot_names_those_there(trained: Trained) -> None:
    with pytest.raises(SystemExit, match=r"no weights-020\.pt in .*; it holds .*weights-010\.pt"):
        load_flat(trained.workdir / "weights-020.pt", SIZES)


def test_a_foreign_directory_is_not_overwritten(trained: Trained, tmp_path: Path) -> None:
    check_output(tmp_path)  # empty
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="not empty"):
        check_output(tmp_path)
    with pytest.raises(SystemExit, match="is a file"):
        check_output(tmp_path / "thesis.tex")
    command = [str(trained.text), *OPTIONS, "--workdir", str(tmp_path / "work"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="not empty"):
        train_reference.main(command)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]  # refused before any work


def test_the_log_of_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    steps = [1, 20, 40, 60, 20, 40, 60, 80]
    lines = [json.dumps({"step": step, "time": time}) for time, step in enumerate(steps)]
    path.write_text("\n".join(lines) + '\n{"step": 1')
    records = read_log(path, last_step=60)
    assert [(r["step"], r["time"]) for r in records] == [(1, 0), (20, 4), (40, 5), (60, 6)]
    assert read_log(tmp_path / "absent", 60) == []


@given(count=st.integers(0, 1000), rows=st.integers(1, 300))
def test_thinning_keeps_the_end(count: int, rows: int) -> None:
    records = [{"step": i} for i in range(count)]
    kept = thin(records, rows)
    assert len(kept) <= rows
    assert kept[-1:] == records[-1:]
    assert all(b["step"] > a["step"] for a, b in pairwise(kept))


def test_reading_stops_before_a_cut_character(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("aé" * 10)
    assert read_start(tmp_path / "t.txt", 5) == "aéa"

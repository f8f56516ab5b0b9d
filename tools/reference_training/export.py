"""Trained flat weights in, a Hugging Face model directory out: conversion, parity check, held-out perplexities.

Writes nothing unless transformers computes the same logits as the training code. Knows nothing of how the
weights were trained; the words and the picture of the model card are in ``card.py``.
"""

from __future__ import annotations

import json
import lzma
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

from .card import Facts, model_card, read_log, save_curve, thin
from .data import END_OF_TEXT
from .loop import START, TrainConfig
from .model import ModelConfig, ReferenceModel

MARKER = "eval.json"  # a directory with this file is an earlier export and may be replaced
EVAL_BYTES = 300_000
EVAL_WINDOW = 256
MAX_LOGIT_DIFFERENCE = 1e-4
LOG_ROWS = 300


@dataclass(frozen=True)
class Score:
    """Held-out quality: predicted tokens, mean loss (nats per token) and two forms of it."""

    tokens: int
    nll: float
    ppl: float
    bits_per_byte: float


class LogitsModel(ReferenceModel):
    """The training arithmetic with a view of its logits: the last norm that ``forward`` takes is the head's input."""

    last_normalised: Tensor

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        self.last_normalised = super()._norm(x, weight)
        return self.last_normalised

    def logits(self, tokens: Tensor) -> Tensor:
        """tokens ``[B, S + 1]`` (int64) -> fp32 logits ``[B, S, V]`` of all but the last token."""
        self(tokens)
        head = self.named(self.flat)["model.embed_tokens.weight"]
        return (self.last_normalised @ head.t()).view(len(tokens), -1, len(head))


def check_output(out: Path) -> None:
    """Refuse an output directory that holds something other than an earlier export.

    Raises:
        SystemExit: names the directory and the way out.
    """
    if out.exists() and not out.is_dir():
        raise SystemExit(f"{out} is a file; name a directory for the model")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).is_file():
        raise SystemExit(f"{out} is not empty and holds no earlier export (no {MARKER}); name another directory")


def load_flat(path: Path, config: ModelConfig) -> tuple[LogitsModel, int]:
    """The training model with the weights of a snapshot or of ``state.pt``, and the step they are from."""
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in path.parent.glob("*.pt"))) or "no checkpoint at all"
        raise SystemExit(f"no {path.name} in {path.parent}; it holds {found}")
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    model = LogitsModel(config, 0, torch.device("cpu"))
    if state["flat"].numel() != model.flat.numel():
        raise SystemExit(
            f"{path} holds {state['flat'].numel():,} parameters, the model named has {model.flat.numel():,}; "
            "give the size options of the training run"
        )
    with torch.no_grad():
        model.flat.copy_(state["flat"])
    return model, int(state["step"])


def to_transformers(model: ReferenceModel, balance_loss: float) -> OlmoeForCausalLM:
    """The same weights (fp32, copied) as an ``OlmoeForCausalLM`` in evaluation mode."""
    config = model.config
    hf_config = OlmoeConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.neurons,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        num_experts=config.experts,
        num_experts_per_tok=config.top_k,
        norm_topk_prob=config.norm_topk_prob,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        router_aux_loss_coef=balance_loss,
        clip_qkv=None,
        tie_word_embeddings=True,
        # the only special token, END_OF_TEXT, has id 0 because the tokenizer's trainer puts it first
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    hf_model = OlmoeForCausalLM(hf_config)  # in fp32, torch's default
    missing, unexpected = hf_model.load_state_dict(model.named(model.flat.detach()), strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:
        raise SystemExit(f"transformers names other parameters: missing {missing}, unexpected {unexpected}")
    hf_model.tie_weights()
    hf_model.eval()
    return hf_model


@torch.no_grad()
def write_start(directory: Path, workdir: Path, config: ModelConfig) -> int:
    """``workdir/start.pt`` from an exported model: its bf16 weights and the last step that it logged.

    The log goes on where the model's own ends.

    Raises:
        SystemExit: the model has other sizes or another tokenizer, or no training log.
    """
    log = directory / "training_log.jsonl"
    if not log.is_file():
        raise SystemExit(f"{directory} has no training_log.jsonl; --init-from needs a model that this script exported")
    theirs, ours = (
        json.loads((folder / "tokenizer.json").read_text())["model"] for folder in (directory, workdir / "tokenizer")
    )
    if theirs != ours:
        raise SystemExit(f"{directory} has another tokenizer than {workdir}; give the text that it was trained on")
    step = max(json.loads(line)["step"] for line in log.read_text().splitlines())
    weights = OlmoeForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
    model = ReferenceModel(config, 0, torch.device("cpu"))
    for name, part in model.named(model.flat).items():
        if weights[name].shape != part.shape:
            raise SystemExit(
                f"{directory}: {name} is {tuple(weights[name].shape)}, the settings mean {tuple(part.shape)}"
            )
        part.copy_(weights[name])
    (workdir / "log.jsonl").write_bytes(log.read_bytes())
    torch.save({"flat": model.flat.detach(), "step": step}, workdir / START)
    return step


@torch.no_grad()
def logit_difference(model: LogitsModel, hf_model: OlmoeForCausalLM, tokens: Tensor) -> float:
    """Largest |logit of the training code - logit of transformers| on tokens ``[B, S + 1]``, in fp32.

    Raises:
        SystemExit: above 1e-4, or not a number; the weights would not mean in transformers what they were trained to.
    """
    difference = float((model.logits(tokens) - hf_model(tokens[:, :-1]).logits).abs().max())
    if not difference <= MAX_LOGIT_DIFFERENCE:
        raise SystemExit(
            f"transformers and the training code differ by {difference:.3g} in a logit, "
            f"at most {MAX_LOGIT_DIFFERENCE:g} is allowed; nothing was written"
        )
    return difference


def read_start(path: Path, n_bytes: int = EVAL_BYTES) -> str:
    """The first ``n_bytes`` of a plain or ``.xz`` UTF-8 text; a character cut at the end is dropped."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rb") as handle:
        return bytes(handle.read(n_bytes)).decode("utf-8", errors="ignore")


@torch.no_grad()
def evaluate(directory: Path, text: str, batch: int = 16) -> Score:
    """Perplexity of a saved model, its weights as stored, the arithmetic in fp32.

    Windows of 256 predicted tokens follow each other without overlap; the first token of each only
    conditions, and the last incomplete window is left out. Bytes are the text's, in proportion to the
    predicted tokens, so that models with different tokenizers compare.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    count = (len(ids) - 1) // EVAL_WINDOW
    if count < 1:
        raise SystemExit(f"an evaluation text has {len(ids)} tokens, at least {EVAL_WINDOW + 1} are needed")
    windows = ids[: count * EVAL_WINDOW + 1].unfold(0, EVAL_WINDOW + 1, EVAL_WINDOW)
    total = 0.0
    for rows in windows.split(batch):
        logits = model(rows[:, :-1]).logits
        total += float(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
    predicted = count * EVAL_WINDOW
    n_bytes = len(text.encode()) * predicted / (len(ids) - 1)
    nll = total / predicted
    return Score(predicted, round(nll, 4), round(math.exp(nll), 2), round(total / math.log(2) / n_bytes, 4))


def export(
    workdir: Path,
    weights: Path,
    config: ModelConfig,
    out: Path,
    eval_texts: list[Path],
    *,
    training: TrainConfig,
    command: str,
    data_note: str,
    compare: Path | None = None,
) -> None:
    """Write the model, its tokenizer, its scores, its training log and its card to ``out``, or nothing.

    Args:
        workdir: the training run's directory: tokenizer, tokens, log. Only read.
        weights: a snapshot ``weights-*.pt`` or ``state.pt`` of that run.
        config: sizes of the model that was trained.
        out: new, empty, or an earlier export, which is replaced in one step at the end.
        eval_texts: held-out texts; the first 300 KB of each are measured.
        training: settings of the run, for the card.
        command: the command line that reproduces the run, for the card.
        data_note: where the training text is from and its licence, for the card.
        compare: another model directory, measured on the same texts for the card.

    Raises:
        SystemExit: an unusable path, weights of another size, or logits that differ from transformers'.
    """
    check_output(out)
    data = _read_data(workdir)
    model, step = load_flat(weights, config)
    hf_model = to_transformers(model, training.balance_loss)
    tokens = np.fromfile(workdir / "tokens.bin", dtype=np.uint16, count=2 * (training.context + 1))
    difference = logit_difference(model, hf_model, torch.from_numpy(tokens.astype(np.int64)).view(2, -1))
    print(f"parity with transformers: max |logit difference| {difference:.2g}", flush=True)

    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir(parents=True)
    try:
        hf_model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer = AutoTokenizer.from_pretrained(workdir / "tokenizer")
        if tokenizer.convert_tokens_to_ids(END_OF_TEXT) != 0:
            raise SystemExit(f"{workdir / 'tokenizer'}: {END_OF_TEXT} must have id 0")
        tokenizer.save_pretrained(temporary)
        texts = {f"{path.parent.name}/{path.name} (first 300 KB)": read_start(path) for path in eval_texts}
        scores = _score(temporary, texts, out.name)
        log = read_log(workdir / "log.jsonl", step)
        save_curve(temporary / "training_curve.png", log)
        (temporary / "training_log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in thin(log, LOG_ROWS)))
        facts = Facts(
            name=out.name,
            config=config,
            training=training,
            parameters=model.flat.numel(),
            step=step,
            log=log,
            data=data,
            data_note=data_note,
            command=command,
            logit_difference=difference,
            scores={name: vars(score) for name, score in scores.items()},
            compared=compare.name if compare else None,
            compared_scores={n: vars(s) for n, s in _score(compare, texts, compare.name).items()} if compare else {},
        )
        (temporary / "README.md").write_text(model_card(facts))
        (temporary / MARKER).write_text(json.dumps(facts.scores, indent=1) + "\n")
        size = sum(p.stat().st_size for p in temporary.iterdir())
        _replace(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    print(f"wrote {out}: {size / 1e6:.1f} MB", flush=True)


def _read_data(workdir: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads((workdir / "data.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SystemExit(f"{workdir} is not the directory of a training run: {error}") from error
    return data


def _score(directory: Path, texts: dict[str, str], name: str) -> dict[str, Score]:
    scores = {}
    for text_name, text in texts.items():
        scores[text_name] = evaluate(directory, text)
        print(f"{name} on {text_name}: {scores[text_name]}", flush=True)
    return scores


def _replace(temporary: Path, out: Path) -> None:
    """Rename ``temporary`` to ``out``; an earlier export steps aside first and is then deleted."""
    previous = out.with_name(out.name + ".previous")
    if out.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(out, previous)
    os.rename(temporary, out)
    shutil.rmtree(previous, ignore_errors=True)

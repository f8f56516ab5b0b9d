"""Refactor tiny models for tests, in memory or on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model, tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from moe_prism import Recipe
from moe_prism.elastic import attach
from moe_prism.refactor import refactor_model

WORDS = "the sea was calm and the old captain said nothing while the ship went on towards the shore . "


def recipe(**changes: Any) -> Recipe:
    """A recipe of seconds: N = 4, 512 calibration tokens that the model writes itself."""
    quick = {"calibration_tokens": 512, "context": 32, "solver": "greedy", "gate": "static", "neurons": "all"}
    return Recipe.of(quick | changes)


def elastic_model(family: str, folder: Path, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model of the family, refactored in memory."""
    model = tiny_model(family, seed)
    done, work = refactor_model(model, None, recipe(**changes), folder / "out")
    work.remove()
    attach(model, done.elastic, done.tensors)
    return model


def save_stock(folder: Path, family: str = "olmoe", seed: int = 0, **changes: Any) -> Path:
    """A tiny stock checkpoint with a tokenizer of 96 tokens."""
    model = tiny_model(family, seed, **changes)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted(set(pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(WORDS)[0][0] + "Ġ"))
    trainer = trainers.BpeTrainer(vocab_size=96, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=letters)
    tokenizer.train_from_iterator([WORDS], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def logits(model: PreTrainedModel, **how: Any) -> torch.Tensor:
    """Logits of the standard batch."""
    with torch.no_grad():
        out: torch.Tensor = model(tokens(**how)).logits
    return out

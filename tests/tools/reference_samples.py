"""Sizes, options and text of the tiny training run that the tests of tools/train_reference.py share."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import NamedTuple

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

from reference_training.model import ModelConfig  # noqa: E402  (found by the path above)

SIZES = ModelConfig(
    vocab_size=320, hidden_size=32, layers=2, experts=16, neurons=16, top_k=4, heads=4, max_positions=64
)
SETTINGS = {"context": 32, "step_tokens": 256, "tokens": 10240, "warmup_steps": 5, "learning_rate": 0.01, "workers": 1}
# what differs from the command's defaults
SIZE_SETTINGS = {"vocab_size": 320, "hidden_size": 32, "layers": 2, "experts": 16, "neurons": 16, "max_positions": 64}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in {**SIZE_SETTINGS, **SETTINGS}.items()]


class Trained(NamedTuple):
    """A finished run: the text files, its working directory and its export."""

    text: Path
    held_out: Path
    workdir: Path
    out: Path


def sentences(count: int, seed: int) -> str:
    """Text with structure to learn: a small grammar, a few accents and emoji, seeded."""
    rng = random.Random(seed)
    names, verbs, things = ["Anna", "Jörg", "the dog", "a cat"], ["sees", "eats", "greets"], ["bread", "café", "🌲"]
    return "\n".join(f"{rng.choice(names)} {rng.choice(verbs)} {rng.choice(things)}." for _ in range(count)) + "\n"

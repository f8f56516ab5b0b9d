"""A small elastic checkpoint beside its original, for the tests of reading and restoring."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoint_samples import EXPERTS, N, bf16_model, elastic_config, measured, random_permutations

from moe_prism.checkpoint.schema import permutation_key
from moe_prism.checkpoint.write import write_checkpoint
from moe_prism.experts import find_expert_layers, permute_neurons


@dataclass(frozen=True)
class Sample:
    """Where the original and its elastic form lie, and the tensors of the latter."""

    original: Path
    elastic: Path
    tensors: dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """Read-only for tests; copy ``elastic`` (fixture ``checkpoint``) to damage it."""
    root = tmp_path_factory.mktemp("sample")
    model = bf16_model()
    model.save_pretrained(root / "original")
    tensors = {**random_permutations(), "gate.importance": torch.rand(2, EXPERTS * N)}
    for layer in find_expert_layers(model):
        permute_neurons(layer, tensors[permutation_key(layer.name)])

    def save(path: Path) -> None:
        model.save_pretrained(path)
        (path / "tokenizer.json").write_text('{"kept": true}')
        (path / "tokenizer").mkdir()
        (path / "tokenizer" / "vocab.txt").write_text("kept too")

    write_checkpoint(
        root / "elastic",
        save_model=save,
        elastic=elastic_config(),
        tensors=tensors,
        recipe_yaml="gate: static\n",
        card="# Card\n",
        operating_points=measured(),
    )
    return Sample(root / "original", root / "elastic", tensors)


@pytest.fixture
def checkpoint(sample: Sample, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(sample.elastic, tmp_path / "checkpoint"))

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from checkpoint_samples import contents, elastic_config
from safetensors.torch import load_file
from tiny import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM

from moe_prism.checkpoint.restore import restore_checkpoint
from moe_prism.checkpoint.schema import permutation_key
from moe_prism.checkpoint.write import update_checkpoint, write_checkpoint
from moe_prism.errors import CheckpointError, PrismError
from moe_prism.experts import find_expert_layers, permute_neurons


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in path.glob("*.safetensors") for name, value in load_file(file).items()}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)), name


def test_original_comes_back(sample, tmp_path: Path) -> None:
    before = contents(sample.elastic)
    original = weights(sample.original)
    assert any(not torch.equal(value, weights(sample.elastic)[name]) for name, value in original.items())
    restore_checkpoint(sample.elastic, tmp_path / "out")
    assert_same_bits(weights(tmp_path / "out"), original)
    restored, expected = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "out", sample.original))
    assert restored == expected
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"kept": true}'
    assert (tmp_path / "out" / "tokenizer" / "vocab.txt").read_text() == "kept too"
    assert not {"README.md", "SHA256SUMS", "moe_prism"} & {p.name for p in (tmp_path / "out").iterdir()}
    assert contents(sample.elastic) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "original")
    layers = find_expert_layers(model)
    first = layers[0]
    elastic = elastic_config(
        layers=[layer.name for layer in layers],
        num_experts=first.num_experts,
        num_neurons=first.num_neurons,
        top_k=first.top_k,
        full_budget=first.top_k * 4,
    )
    permutations = {}
    for layer in layers:
        order = torch.stack([torch.randperm(layer.num_neurons) for _ in range(layer.num_experts)])
        permutations[permutation_key(layer.name)] = order.int()
        permute_neurons(layer, order)
    write_checkpoint(
        tmp_path / "elastic",
        save_model=model.save_pretrained,
        elastic=elastic,
        tensors=permutations,
        recipe_yaml="",
        card="",
    )
    restore_checkpoint(tmp_path / "elastic", tmp_path / "out")
    assert_same_bits(weights(tmp_path / "out"), weights(tmp_path / "original"))


def test_elastic_loads_as_the_original(sample) -> None:
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        stock, elastic = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
            for path in (sample.original, sample.elastic)
        )
    assert (stock - elastic).abs().max() <= 1e-4


def test_refused_before_loading(sample, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(PrismError, match="not empty"):
        restore_checkpoint(checkpoint, tmp_path / "full")
    with pytest.raises(PrismError, match="inside the checkpoint"):
        restore_checkpoint(checkpoint, checkpoint / "moe_prism" / "out")
    with pytest.raises(CheckpointError, match="stock model"):
        restore_checkpoint(sample.original, tmp_path / "out")
    usage = namedtuple("usage", "total used free")(100, 99, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(PrismError, match="not enough disk space"):
        restore_checkpoint(checkpoint, tmp_path / "out")
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        restore_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_layers_that_the_model_does_not_have(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_prism.experts.find_expert_layers", lambda model: [])
    with pytest.raises(CheckpointError, match=r"names the expert layers model\.layers\.0\.mlp\.experts"):
        restore_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_lossy_load_is_noticed(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda path, dtype: load(path, dtype=torch.float32))
    with pytest.raises(CheckpointError, match=r"does not load and save this model unchanged .*'BF16'.* became .*'F32'"):
        restore_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_results_added_later_do_not_matter(checkpoint: Path, sample, tmp_path: Path) -> None:
    update_checkpoint(checkpoint, {"moe_prism/frontier.png": b"png", "README.md": b"new"})
    restore_checkpoint(checkpoint, tmp_path / "out")
    assert_same_bits(weights(tmp_path / "out"), weights(sample.original))

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from checkpoint_samples import LAYERS, contents, elastic_config, measured
from safetensors.torch import load_file, save_file

from moe_prism.checkpoint import checksums
from moe_prism.checkpoint.inspect import describe
from moe_prism.checkpoint.read import open_checkpoint
from moe_prism.errors import CheckpointError


def edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    config["moe_prism"] |= changes
    (path / "config.json").write_text(json.dumps(config))


def test_opens_what_was_written(sample) -> None:
    opened = open_checkpoint(sample.elastic)
    assert opened.elastic == elastic_config()
    assert opened.operating_points() == measured()
    assert opened.recipe() == "gate: static\n"
    tensors = opened.tensors()
    assert tensors.keys() == sample.tensors.keys()
    assert all(torch.equal(tensors[name], sample.tensors[name]) for name in tensors)


def test_no_operating_points_yet(checkpoint: Path) -> None:
    (checkpoint / "moe_prism" / "operating_points.json").unlink()
    assert open_checkpoint(checkpoint, verify=False).operating_points() is None


def test_what_is_not_a_checkpoint(tmp_path: Path, sample) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, message in {
        tmp_path / "absent": "does not exist",
        tmp_path / "file": "is not a directory",
        tmp_path / "empty": r"no config\.json",
        sample.original: "stock model.*run `moe-prism refactor",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)


@pytest.mark.parametrize("text", ["", '{"model_type": "ol', "[]", "\udcff"])
def test_unreadable_config(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(checkpoint)


def test_future_version(checkpoint: Path) -> None:
    edit_config(checkpoint, version=7, new_field=1)
    with pytest.raises(CheckpointError, match="schema version 7, this moe-prism reads up to 1; upgrade moe-prism"):
        open_checkpoint(checkpoint)


def test_every_altered_truncated_missing_file_is_named(checkpoint: Path) -> None:
    names = checksums.list_files(checkpoint)
    assert {"model.safetensors", "moe_prism/tensors.safetensors", "README.md"} <= set(names)
    for name in names:
        file = checkpoint / name
        good = file.read_bytes()
        # The last byte, or the last before a JSON object's end, keeps config.json readable: only the sum can tell.
        altered = (
            good.replace(b'"seed": 0', b'"seed": 1') if name == "config.json" else bytes([*good[:-1], good[-1] ^ 1])
        )
        assert altered != good
        for damaged in (altered, good[: len(good) // 2], b""):
            file.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=name):
                open_checkpoint(checkpoint)
        file.unlink()
        with pytest.raises(CheckpointError, match=name):
            open_checkpoint(checkpoint)
        file.write_bytes(good)
    open_checkpoint(checkpoint)


def test_truncated_and_altered_weights_are_told_apart(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    good = file.read_bytes()
    for damaged, message in (
        (good[:-100], f"model.safetensors is truncated: {len(good) - 100} of {len(good)} bytes"),
        (good[:50], r"model\.safetensors is truncated or altered in its header \(50 bytes"),
        (b"", r"model\.safetensors is truncated to 0 bytes"),
        (good[:-1] + bytes([good[-1] ^ 1]), r"model\.safetensors is altered"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(checkpoint)


def test_all_problems_are_reported_at_once(checkpoint: Path) -> None:
    (checkpoint / "README.md").unlink()
    (checkpoint / "surprise.safetensors").write_bytes(b"x")
    (checkpoint / "moe_prism" / "recipe.yaml").write_text("gate: other\n")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(checkpoint)
    for part in ("README.md is missing", "surprise.safetensors is unexpected", "recipe.yaml is altered or truncated"):
        assert part in str(error.value)


def test_hidden_files_of_download_tools_are_not_ours(checkpoint: Path) -> None:
    (checkpoint / ".gitattributes").write_text("x")
    (checkpoint / ".cache" / "huggingface").mkdir(parents=True)
    (checkpoint / ".cache" / "huggingface" / "x.lock").write_text("x")
    open_checkpoint(checkpoint)


@pytest.mark.parametrize("text", ["nonsense\n", f"{'a' * 64}  /etc/passwd\n", f"{'a' * 64}  ../outside\n"])
def test_malformed_sums(checkpoint: Path, text: str) -> None:
    sums = checkpoint / "SHA256SUMS"
    lines = len(sums.read_text().splitlines())
    sums.write_text(sums.read_text() + text)
    with pytest.raises(CheckpointError, match=f"SHA256SUMS: line {lines + 1} is not a checksum line"):
        open_checkpoint(checkpoint)


def test_missing_sums(checkpoint: Path) -> None:
    (checkpoint / "SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match="has no SHA256SUMS"):
        open_checkpoint(checkpoint)
    open_checkpoint(checkpoint, verify=False)


def test_sums_are_those_of_sha256sum(checkpoint: Path) -> None:
    ours = (checkpoint / "SHA256SUMS").read_text()
    names = [line.split("  ")[1] for line in ours.splitlines()]
    assert names == sorted(set(contents(checkpoint)) - {"SHA256SUMS"})
    theirs = subprocess.run(["sha256sum", *names], cwd=checkpoint, capture_output=True, text=True, check=True)
    assert ours == theirs.stdout


def test_missing_or_unreadable_tensors_without_verification(checkpoint: Path) -> None:
    file = checkpoint / "moe_prism" / "tensors.safetensors"
    tensors = load_file(file)
    key = f"{LAYERS[0]}.permutation"
    save_file({name: value for name, value in tensors.items() if name != key}, file)
    with pytest.raises(CheckpointError, match=f"no tensor '{key}'"):
        open_checkpoint(checkpoint, verify=False).tensors()
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors is missing, truncated or altered"):
        open_checkpoint(checkpoint, verify=False).tensors()
    file.unlink()
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors is missing, truncated or altered"):
        open_checkpoint(checkpoint, verify=False).tensors()
    (checkpoint / "moe_prism" / "recipe.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"recipe\.yaml is missing"):
        open_checkpoint(checkpoint, verify=False).recipe()


def test_points_of_another_checkpoint(checkpoint: Path) -> None:
    edit_config(checkpoint, num_sub_experts=2, full_budget=4)
    with pytest.raises(CheckpointError, match="full budget 8, this one has 4"):
        open_checkpoint(checkpoint, verify=False).operating_points()


def test_describe_is_json_and_true(sample) -> None:
    summary = json.loads(json.dumps(describe(sample.elastic)))
    assert summary["elastic"] == elastic_config().model_dump(mode="json")
    assert summary["operating_points"] == measured().model_dump(mode="json")
    assert summary["recipe"] == "gate: static\n"
    assert summary["verified"] is True
    files = {name: data for name, data in contents(sample.elastic).items() if name != "SHA256SUMS"}
    assert summary["files"] == len(files)
    assert summary["bytes"] == sum(map(len, files.values()))
    assert summary["weights_bytes"] == len(files["model.safetensors"])
    assert summary["tensors"]["gate.importance"] == {"dtype": "F32", "shape": [2, 16]}
    assert summary["tensors"][f"{LAYERS[0]}.permutation"] == {"dtype": "I32", "shape": [4, 8]}


def test_describe_without_tensors(checkpoint: Path) -> None:
    (checkpoint / "moe_prism" / "tensors.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"tensors\.safetensors is missing, truncated or altered"):
        describe(checkpoint, verify=False)

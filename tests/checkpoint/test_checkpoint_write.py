from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_samples import config_only, contents, elastic_config, measured, random_permutations, write_small
from safetensors.torch import load_file

from moe_prism.checkpoint import atomic, write
from moe_prism.checkpoint.atomic import check_disk_space, check_output
from moe_prism.checkpoint.checksums import verify_sums
from moe_prism.checkpoint.read import open_checkpoint
from moe_prism.checkpoint.write import update_checkpoint
from moe_prism.errors import CheckpointError, PrismError


def never(path: Path) -> None:
    pytest.fail(f"save_model was called with {path}")


def sha256sum_agrees(root: Path) -> bool:
    result = subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "SHA256SUMS"], cwd=root, check=False)
    return result.returncode == 0


def test_layout(tmp_path: Path) -> None:
    out = tmp_path / "new" / "parents" / "out"
    write_small(out, operating_points=measured(), extra_files={"moe_prism/frontier.png": b"png", "LICENSE": b"free"})
    assert set(contents(out)) == {
        "config.json",
        "model.safetensors",
        "README.md",
        "LICENSE",
        "SHA256SUMS",
        "moe_prism/tensors.safetensors",
        "moe_prism/recipe.yaml",
        "moe_prism/operating_points.json",
        "moe_prism/frontier.png",
    }
    config = json.loads((out / "config.json").read_text())
    assert config == {"model_type": "olmoe", "moe_prism": elastic_config().model_dump(mode="json")}
    assert {k: v.tolist() for k, v in load_file(out / "moe_prism" / "tensors.safetensors").items()} == {
        k: v.tolist() for k, v in random_permutations().items()
    }
    assert sha256sum_agrees(out)
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == out.parent.stat().st_mode & 0o777


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = random_permutations()
    write_small(tmp_path / "a", tensors=tensors)
    write_small(tmp_path / "b", tensors=dict(reversed(tensors.items())))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_views_and_shared_tensors_can_be_saved(tmp_path: Path) -> None:
    tensors = random_permutations()
    first = next(iter(tensors.values()))
    write_small(tmp_path / "out", tensors={**tensors, "view": first.t(), "alias": first[1:]})
    loaded = open_checkpoint(tmp_path / "out").tensors()
    assert loaded["view"].tolist() == first.t().tolist()
    assert loaded["alias"].tolist() == first[1:].tolist()


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write_small(tmp_path / "out")
    verify_sums(tmp_path / "out")


def test_unusable_outputs_are_refused_before_work(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for name, message in {"full": "not empty", "file": "is a file", "file/below": "is not a directory"}.items():
        with pytest.raises(PrismError, match=message):
            check_output(tmp_path / name)
        with pytest.raises(PrismError, match=message):
            write_small(tmp_path / name, save_model=never)
    assert contents(tmp_path) == before


def test_a_directory_without_write_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write anywhere
    with pytest.raises(PrismError, match="no permission to write"):
        check_output(tmp_path / "a" / "b")


def test_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10**9, 10**9 - 5_000_000, 5_000_000)
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage)
    check_disk_space(tmp_path / "a" / "b", 5_000_000)
    with pytest.raises(PrismError, match=r"5\.1 MB are needed, 5\.0 MB are free"):
        check_disk_space(tmp_path / "a" / "b", 5_100_000)
    assert asked == [tmp_path, tmp_path]


@pytest.mark.parametrize(
    "name",
    ["config.json", "SHA256SUMS", "README.md", "moe_prism/recipe.yaml", "../x", "/x", "a//b", "", "a\nb", ".x", "a/.b"],
)
def test_extra_files_keep_to_their_place(tmp_path: Path, name: str) -> None:
    with pytest.raises(PrismError, match=r"not allowed|written by moe-prism"):
        write_small(tmp_path / "out", save_model=never, extra_files={name: b""})


def test_extra_file_cannot_replace_the_models(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match=r"model\.safetensors is also written by the model"):
        write_small(tmp_path / "out", extra_files={"model.safetensors": b""})
    assert list(tmp_path.iterdir()) == []


def test_tensors_must_hold_every_permutation(tmp_path: Path) -> None:
    tensors = random_permutations()
    name = "model.layers.1.mlp.experts.permutation"
    for change, message in ((tensors[name][:, 1:], r"\(4, 7\)"), (tensors[name].long(), "int64")):
        with pytest.raises(CheckpointError, match=message):
            write_small(tmp_path / "out", save_model=never, tensors={**tensors, name: change})
    del tensors[name]
    with pytest.raises(CheckpointError, match=f"no tensor '{name}'"):
        write_small(tmp_path / "out", save_model=never, tensors=tensors)


def test_points_of_another_budget_are_refused(tmp_path: Path) -> None:
    elastic = elastic_config(num_sub_experts=2, full_budget=4)
    with pytest.raises(PrismError, match="full budget 8 do not belong to a checkpoint of full budget 4"):
        write_small(tmp_path / "out", save_model=never, elastic=elastic, operating_points=measured())


def test_a_failing_save_leaves_nothing(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        config_only(path)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_small(tmp_path / "out", save_model=fail)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PrismError, match=r"no config\.json"):
        write_small(tmp_path / "out", save_model=lambda path: None)
    assert list(tmp_path.iterdir()) == []


def test_an_output_taken_meanwhile_is_kept(tmp_path: Path) -> None:
    def slow(path: Path) -> None:
        config_only(path)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")

    with pytest.raises(PrismError, match="was taken while"):
        write_small(tmp_path / "out", save_model=slow)
    assert contents(tmp_path) == {"out/mine.txt": b"mine"}


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(action: Callable[[], object], **replaced: Callable[..., object]) -> None:
    """Run ``action`` in a forked process that must end by SIGKILL, with functions of the writer replaced."""
    child = os.fork()
    if child == 0:
        try:
            for name, function in replaced.items():
                setattr(atomic if name == "sync" else write, name, function)
            action()
        finally:
            os._exit(0)  # pytest must not go on in the child
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("stage", ["save_model", "_save_tensors", "write_sums", "sync"])
def test_kill_leaves_out_absent_and_the_next_run_cleans_up(tmp_path: Path, stage: str) -> None:
    out = tmp_path / "out"
    neighbour = tmp_path / ".out.b.12345678.partial"  # of a target named "out.b"
    neighbour.mkdir()
    if stage == "save_model":
        killed(lambda: write_small(out, save_model=lambda path: (config_only(path), die())))
    else:
        killed(lambda: write_small(out), **{stage: die})
    assert not out.exists()
    assert len([p for p in tmp_path.iterdir() if p.name.endswith(".partial")]) == 2
    write_small(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == [neighbour.name, "out"]
    verify_sums(out)


def test_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    def nested(path: Path) -> None:
        config_only(path)
        atomic._remove_leftovers(tmp_path / "out")
        assert path.is_dir()

    write_small(tmp_path / "out", save_model=nested)
    verify_sums(tmp_path / "out")


def test_update_adds_and_replaces(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_small(out)
    before = contents(out)
    points = measured().to_json().encode()
    update_checkpoint(out, {"moe_prism/operating_points.json": points, "README.md": b"new"})
    after = contents(out)
    assert after.keys() == before.keys() | {"moe_prism/operating_points.json"}
    assert {name for name in before if after[name] != before[name]} == {"README.md", "SHA256SUMS"}
    assert sha256sum_agrees(out)
    assert open_checkpoint(out).operating_points() == measured()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "SHA256SUMS", "moe_prism/../config.json"])
def test_update_leaves_the_model_alone(tmp_path: Path, name: str) -> None:
    write_small(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(PrismError):
        update_checkpoint(tmp_path / "out", {name: b"x"})
    assert contents(tmp_path) == before


def test_update_does_not_whitewash_damage(tmp_path: Path) -> None:
    write_small(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"Weights")
    update_checkpoint(tmp_path / "out", {"README.md": b"new"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        verify_sums(tmp_path / "out")


UPDATE = {"moe_prism/a.json": b"A", "README.md": b"new"}


@pytest.mark.parametrize("stage", ["_write_files", "format_sums", "sync_tree"])
def test_update_killed_before_its_decision_changes_nothing(tmp_path: Path, stage: str) -> None:
    out = tmp_path / "out"
    write_small(out)
    before = contents(out)
    killed(lambda: update_checkpoint(out, UPDATE), **{stage: die})
    open_checkpoint(out)
    assert {name: data for name, data in contents(out).items() if not name.startswith(".")} == before
    update_checkpoint(out, {"moe_prism/b.json": b"B"})
    assert contents(out).keys() == before.keys() | {"moe_prism/b.json"}
    verify_sums(out)


def killed_after_moving(out: Path, moves: int) -> None:
    """An update that has moved this many of its files to their places."""
    done = []

    def replace(source: Path, target: Path, real: Callable[[Path, Path], None] = os.replace) -> None:
        if len(done) == moves:
            die()
        done.append(target)
        real(source, target)

    def update() -> None:
        os.replace = replace
        update_checkpoint(out, UPDATE)

    killed(update)


@pytest.mark.parametrize("moves", [0, 1, 2])
@pytest.mark.parametrize("finisher", ["open", "update"])
def test_update_killed_after_its_decision_is_finished(tmp_path: Path, moves: int, finisher: str) -> None:
    out = tmp_path / "out"
    write_small(out)
    killed_after_moving(out, moves)
    if moves:
        with pytest.raises(CheckpointError, match=r"README\.md is altered"):
            verify_sums(out)
    if finisher == "open":
        open_checkpoint(out)
    else:
        update_checkpoint(out, {"moe_prism/b.json": b"B"})
    verify_sums(out)
    files = contents(out)
    assert (files["moe_prism/a.json"], files["README.md"]) == (b"A", b"new")
    assert not any(name.startswith(".") for name in files)


def test_interrupted_update_on_a_read_only_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    write_small(out)
    killed_after_moving(out, 0)

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(write.os, "replace", refuse)
    with pytest.raises(CheckpointError, match=r"update of .* was interrupted .*Read-only"):
        open_checkpoint(out)

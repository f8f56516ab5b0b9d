"""Write an elastic checkpoint, whole or not at all, and later add measured results to it.

Knows nothing of how weights were permuted or gates fitted: the caller hands over a function that saves the
model and the tensors of ours that go beside it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from ..errors import CheckpointError, PrismError
from .atomic import atomic_directory, sync, sync_tree
from .checksums import SUMS_FILE, format_sums, read_sums, sha256, write_sums
from .schema import (
    CARD_FILE,
    CONFIG_KEY,
    OPERATING_POINTS_FILE,
    OUR_FOLDER,
    RECIPE_FILE,
    TENSORS_FILE,
    ElasticConfig,
    OperatingPoints,
    permutation_key,
)

if TYPE_CHECKING:
    from torch import Tensor

_STAGE = ".moe_prism-update"


def write_checkpoint(
    out: Path,
    *,
    save_model: Callable[[Path], None],
    elastic: ElasticConfig,
    tensors: dict[str, Tensor],
    recipe_yaml: str,
    card: str,
    operating_points: OperatingPoints | None = None,
    extra_files: dict[str, bytes] | None = None,
) -> None:
    """Write the checkpoint into a hidden sibling of ``out`` and rename it when everything is on the disk.

    Args:
        out: a new or empty directory; parents are made.
        save_model: called once with the temporary directory; saves the permuted model (and its tokenizer) in the
            hub's layout, such as ``model.save_pretrained`` does, and so at least config.json.
        elastic: what config.json says under "moe_prism".
        tensors: content of moe_prism/tensors.safetensors: gate and recalibration tensors by name, and for every
            layer its permutation (:func:`~moe_prism.checkpoint.schema.permutation_key`), int32 ``[E, C]``.
        recipe_yaml: the recipe that made it.
        card: README.md, for instance of :func:`~moe_prism.checkpoint.card.model_card`.
        operating_points: measured points, if there are any yet (:func:`update_checkpoint` adds them later).
        extra_files: more files by relative name, for instance plots under ``moe_prism/``.

    Raises:
        PrismError: ``out`` is not usable or taken; an extra file's name is not allowed; the points are of another
            budget. Checked before ``save_model`` is called. On any exception the temporary is removed and ``out``
            stays absent; after a kill the next write to the same ``out`` removes it.
        CheckpointError: a layer's permutation is missing or of the wrong shape or type.
    """
    files = dict(extra_files or {})
    _check_names(files, reserved={"config.json", CARD_FILE, TENSORS_FILE, RECIPE_FILE, OPERATING_POINTS_FILE})
    check_permutations(elastic, tensors)
    if operating_points is not None:
        if operating_points.full_budget != elastic.full_budget:
            raise PrismError(
                f"operating points of full budget {operating_points.full_budget} do not belong to a checkpoint of "
                f"full budget {elastic.full_budget}; measure this one"
            )
        files[OPERATING_POINTS_FILE] = operating_points.to_json().encode()
    files[RECIPE_FILE] = recipe_yaml.encode()
    files[CARD_FILE] = card.encode()
    with atomic_directory(out) as partial:
        save_model(partial)
        _merge_config(partial / "config.json", elastic)
        taken = sorted(name for name in files if (partial / name).exists() and name != CARD_FILE)
        if taken:
            raise PrismError(f"extra file {', '.join(taken)} is also written by the model; give it another name")
        _write_files(partial, files)
        _save_tensors(partial / TENSORS_FILE, tensors)
        write_sums(partial)


def update_checkpoint(path: Path, files: dict[str, bytes]) -> None:
    """Replace or add README.md and files under ``moe_prism/``, and bring SHA256SUMS up to date.

    The new files are first collected in a hidden folder, the new SHA256SUMS last; from then on the update is
    decided, and moving the files to their places can be repeated: a killed update is finished by the next one or
    by :func:`~moe_prism.checkpoint.read.open_checkpoint`. Killed earlier, nothing has changed. Checksums of all
    other files are kept as they were, so damage to them stays visible. One writer at a time.

    Args:
        path: an elastic checkpoint.
        files: content by relative name.

    Raises:
        PrismError: a name outside README.md and ``moe_prism/``.
        CheckpointError: ``path`` has no readable SHA256SUMS.
    """
    _check_names(files, reserved=set())
    foreign = sorted(name for name in files if name != CARD_FILE and not name.startswith(OUR_FOLDER))
    if foreign:
        raise PrismError(
            f"cannot update {', '.join(foreign)}: only {CARD_FILE} and files under {OUR_FOLDER} may change"
        )
    finish_update(path)
    sums = read_sums(path)
    stage = path / _STAGE
    shutil.rmtree(stage, ignore_errors=True)  # of an update that was killed before it was decided
    stage.mkdir()
    try:
        _write_files(stage, files)
        sums |= {name: sha256(stage / name) for name in files}
        draft = stage / f"{SUMS_FILE}.draft"
        draft.write_text(format_sums(sums), encoding="utf-8")
        sync_tree(stage)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise
    draft.rename(stage / SUMS_FILE)  # the decision
    sync(stage)
    finish_update(path)


def finish_update(path: Path) -> None:
    """Finish a killed :func:`update_checkpoint`, if one was decided; otherwise do nothing.

    Raises:
        CheckpointError: there is one to finish, but it cannot be written.
    """
    stage = path / _STAGE
    if not (stage / SUMS_FILE).is_file():
        return
    staged = [p.relative_to(stage) for p in sorted(stage.rglob("*")) if p.is_file() and p != stage / SUMS_FILE]
    try:
        for name in [*staged, Path(SUMS_FILE)]:  # the checksums last: they vouch for the others
            (path / name).parent.mkdir(exist_ok=True, parents=True)
            with suppress(FileNotFoundError):  # another process is finishing the same update
                os.replace(stage / name, path / name)
            sync((path / name).parent)
    except OSError as error:
        raise CheckpointError(
            f"an update of {path} was interrupted and cannot be finished ({error}); open it once with write access"
        ) from error
    shutil.rmtree(stage, ignore_errors=True)


def check_permutations(elastic: ElasticConfig, tensors: dict[str, Tensor]) -> None:
    """Every layer of ``elastic`` must have its permutation, an int32 tensor ``[E, C]``.

    Raises:
        CheckpointError: names the tensor that is missing or does not fit.
    """
    shape = (elastic.num_experts, elastic.num_neurons)
    for layer in elastic.layers:
        key = permutation_key(layer)
        if key not in tensors:
            raise CheckpointError(f"{TENSORS_FILE} has no tensor {key!r}: the checkpoint is incomplete; refactor anew")
        found = (tuple(tensors[key].shape), str(tensors[key].dtype))
        if found != (shape, "torch.int32"):
            raise CheckpointError(f"{TENSORS_FILE}: {key!r} is {found[1]} {found[0]}, needed is torch.int32 {shape}")


def _check_names(names: Iterable[str], reserved: set[str]) -> None:
    for name in names:
        parts = PurePosixPath(name).parts
        plain = parts and name == "/".join(parts) and not any(part.startswith((".", "/")) for part in parts)
        if not plain or "\n" in name or "\\" in name:
            raise PrismError(f"{name!r} is not allowed as a file name: use a relative path without hidden parts")
        if name in reserved | {SUMS_FILE}:
            raise PrismError(f"{name!r} is written by moe-prism itself; give the extra file another name")


def _merge_config(path: Path, elastic: ElasticConfig) -> None:
    if not path.is_file():
        raise PrismError("save_model wrote no config.json: it must save the model in the hub's layout")
    config = json.loads(path.read_text(encoding="utf-8"))
    config[CONFIG_KEY] = elastic.model_dump(mode="json")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_files(root: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    # The format refuses views and shared storage; ours are small, so a copy is cheap.
    plain = {name: tensors[name].detach().cpu().clone().contiguous() for name in sorted(tensors)}
    save_file(plain, path, metadata={"format": "pt"})

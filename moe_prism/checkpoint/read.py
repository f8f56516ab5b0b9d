"""Open an elastic checkpoint: validated configuration first, tensors only when asked for.

Knows nothing of the model's weights or of what the gate tensors mean.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .checksums import format_sums, read_sums, verify_sums
from .schema import (
    CONFIG_KEY,
    COST_MODEL_FILE,
    OPERATING_POINTS_FILE,
    RECIPE_FILE,
    TENSORS_FILE,
    ElasticConfig,
    OperatingPoints,
    parse_elastic_config,
    parse_operating_points,
)
from .write import check_permutations, finish_update

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ElasticCheckpoint:
    """An opened checkpoint; made by :func:`open_checkpoint`."""

    path: Path
    elastic: ElasticConfig

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of moe_prism/tensors.safetensors, on the CPU; every layer's permutation is among them.

        Raises:
            CheckpointError: the file or a permutation is missing, truncated or of the wrong shape.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.path / TENSORS_FILE
        try:
            tensors: dict[str, Tensor] = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is missing, truncated or altered ({error}); copy it again") from error
        check_permutations(self.elastic, tensors)
        return tensors

    def operating_points(self) -> OperatingPoints | None:
        """The measured points, or None where none were measured yet.

        Raises:
            CheckpointError: not valid JSON, of a future version, invalid, or of another checkpoint.
        """
        path = self.path / OPERATING_POINTS_FILE
        if not path.exists():
            return None
        points = parse_operating_points(path.read_bytes())
        if points.full_budget != self.elastic.full_budget:
            raise CheckpointError(
                f"{path} is of a checkpoint with full budget {points.full_budget}, this one has "
                f"{self.elastic.full_budget}; measure anew with `moe-prism sweep`"
            )
        return points

    def recipe(self) -> str:
        """The recipe that made it, as YAML text; raises CheckpointError where the file is missing."""
        path = self.path / RECIPE_FILE
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the copy is incomplete; copy it again")
        return path.read_text(encoding="utf-8")

    def cost_model(self) -> bytes | None:
        """The measured cost model as JSON text, or None where none was measured; its room is ``scheduling``."""
        path = self.path / COST_MODEL_FILE
        return path.read_bytes() if path.is_file() else None

    def fingerprint(self) -> str:
        """16 hex digits of the weights' and gate's checksums and the configuration; measurements do not change it.

        Raises:
            CheckpointError: no readable SHA256SUMS.
        """
        sums = read_sums(self.path)
        decisive = {name: sums[name] for name in sums if name.endswith(".safetensors") or name == "config.json"}
        return hashlib.sha256(format_sums(decisive).encode()).hexdigest()[:16]


def open_checkpoint(path: Path, verify: bool = True) -> ElasticCheckpoint:
    """Open and validate; an interrupted update (a killed sweep's) is finished first.

    Args:
        path: the checkpoint directory.
        verify: read every file once and compare it with SHA256SUMS. Without it only config.json is read.

    Raises:
        CheckpointError: not a directory; no readable config.json; a stock model; written by a future version; an
            impossible field; with ``verify`` a missing, truncated, altered or unexpected file, by name.
    """
    path = path.expanduser()
    config = _read_config(path)
    if CONFIG_KEY not in config:
        raise CheckpointError(
            f"{path} is a stock model, not an elastic checkpoint: run `moe-prism refactor {path} OUT`"
        )
    elastic = parse_elastic_config(config[CONFIG_KEY])
    finish_update(path)
    if verify:
        verify_sums(path)
    return ElasticCheckpoint(path, elastic)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        state = "is not a directory" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {state}: an elastic checkpoint is a directory that `moe-prism refactor` wrote")
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json: it is not a checkpoint")
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(
            f"{file} is not valid JSON, it is truncated or altered ({error}); copy it again"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(config).__name__}; copy it again")
    return config

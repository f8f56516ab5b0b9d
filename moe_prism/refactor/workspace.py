"""The working folder of a refactoring that is under way: what survives a kill, and when it may be used.

``OUT.partial/`` beside the output holds calibration windows, captured inputs and finished layers. It
belongs to one (model, recipe, text): anything else finds it stale and starts anew. Knows nothing of how
a layer is refactored.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..elastic.fingerprint import fingerprint
from ..experts import ExpertLayer
from .capture import save_tensors
from .layer import LayerResult

_KEY = "key.json"
_WINDOWS = "windows.safetensors"
_PREFIX = "gate."


# What a refactoring settles, in this order, and the files that hold it.
STAGES: dict[str, tuple[str, ...]] = {
    "windows": ("text.txt", _WINDOWS),
    "layers": ("layers/*",),
    "scan": ("scan.json",),
    "compensation": ("compensation-*.safetensors",),
    "sharing": ("sharing.json",),
    "layer_budgets": ("layer_budgets.json",),
    "points": ("points.json",),
}


def folder_of(out: Path) -> Path:
    """Where the unfinished work on an output is."""
    return out.parent / f"{out.name}.partial"


class Workspace:
    """Finished parts of one refactoring."""

    def __init__(self, out: Path, key: dict[str, Any]) -> None:
        """Open ``OUT.partial/``; a folder of another key is removed first."""
        self.path = folder_of(out)
        text = json.dumps(key, indent=1, sort_keys=True)
        file = self.path / _KEY
        self.resumed = file.exists() and file.read_text() == text
        if not self.resumed:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True)
            temporary = file.with_suffix(".tmp")
            temporary.write_text(text)
            os.replace(temporary, file)

    @property
    def capture_folder(self) -> Path:
        """Where captured inputs go."""
        return self.path / "capture"

    def windows(self) -> tuple[Tensor, str] | None:
        """Calibration windows int64 ``[n, context]`` and their name, if they were settled."""
        path = self.path / _WINDOWS
        if not path.exists():
            return None
        return load_file(path)["windows"], (self.path / "text.txt").read_text()

    def keep_windows(self, windows: Tensor, name: str) -> None:
        """Settle the calibration windows."""
        (self.path / "text.txt").write_text(name)
        save_tensors(self.path / _WINDOWS, {"windows": windows})

    def layer(self, number: int) -> LayerResult | None:
        """A finished layer."""
        path = self._layer_path(number)
        if not path.exists():
            return None
        tensors = load_file(path)
        return LayerResult(
            permutation=tensors["permutation"],
            tensors={name.removeprefix(_PREFIX): v for name, v in tensors.items() if name.startswith(_PREFIX)},
            dropped=tensors["dropped"],
            routed_tokens=tensors["routed_tokens"],
            fallbacks=tensors["fallbacks"].tolist(),
        )

    def keep_layer(self, number: int, result: LayerResult) -> None:
        """Finish a layer."""
        path = self._layer_path(number)
        path.parent.mkdir(exist_ok=True)
        fixed = {
            "permutation": result.permutation,
            "dropped": result.dropped,
            "routed_tokens": result.routed_tokens,
            "fallbacks": torch.tensor(result.fallbacks, dtype=torch.int64),
        }
        save_tensors(path, fixed | {f"{_PREFIX}{name}": value for name, value in result.tensors.items()})

    def numbers(self, name: str) -> list[Any] | None:
        """A list that was settled."""
        kept = self.record(name)
        return None if kept is None else list(kept)

    def keep_numbers(self, name: str, numbers: Sequence[float]) -> None:
        """Settle a list."""
        self.keep_record(name, list(numbers))

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """Tensors that were settled, or the last state that was kept of what is still under way."""
        path = self.path / f"{name}.safetensors"
        return load_file(path) if path.exists() else None

    def keep_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Settle tensors, or replace the kept state."""
        save_tensors(self.path / f"{name}.safetensors", tensors)

    def vectors(self, k_active: int) -> dict[str, Tensor] | None:
        """What was fitted at a budget, by layer."""
        return self.tensors(f"compensation-{k_active}")

    def keep_vectors(self, k_active: int, vectors: dict[str, Tensor]) -> None:
        """Finish a budget's fit."""
        self.keep_tensors(f"compensation-{k_active}", vectors)

    def inherit(self, other: Path, before: str) -> None:
        """Take over what another refactoring of the same model settled before a stage; what is here already stays.

        Args:
            other: its working folder.
            before: the first of ``STAGES`` that is not taken over.
        """
        for stage, patterns in STAGES.items():
            if stage == before:
                return
            for path in (path for pattern in patterns for path in other.glob(pattern)):
                target = self.path / path.relative_to(other)
                if not target.exists():
                    target.parent.mkdir(exist_ok=True)
                    temporary = target.with_suffix(".tmp")
                    shutil.copyfile(path, temporary)
                    os.replace(temporary, target)

    def record(self, name: str) -> Any:
        """JSON that was kept, or None."""
        path = self.path / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def keep_record(self, name: str, value: Any) -> None:
        """Keep JSON."""
        path = self.path / f"{name}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(value))
        os.replace(temporary, path)

    def remove(self) -> None:
        """The output is written; nothing here is needed any more."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _layer_path(self, number: int) -> Path:
        return self.path / "layers" / f"layer-{number:03d}.safetensors"


def model_identity(model: Any, layers: list[ExpertLayer]) -> str:
    """A hash of the model's config and of samples of every expert layer's weights."""
    digest = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for layer in layers:
        digest.update(fingerprint(layer.module).numpy().tobytes())
    return digest.hexdigest()

"""What an interrupted measurement has so far, so that it goes on where it was.

A file's name says what it belongs to: another text, other runs or another checkpoint have other files. Knows nothing of
how results are made.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..checkpoint.atomic import replace_file


class Sums(NamedTuple):
    """What adds up over batches for one run.

    Attributes:
        nll: fp32 ``[tokens so far]``.
        kl: sum over them, in nats.
        agreed: tokens with the full model's likeliest one.
    """

    nll: torch.Tensor
    kl: float
    agreed: int


class Kept:
    """A folder of unfinished measurements.

    Attributes:
        folder: made when something is kept.
        of: what is measured; two models that may differ must differ in it.
    """

    def __init__(self, folder: Path, of: str) -> None:
        self.folder = folder
        self.of = of

    def file(self, windows: torch.Tensor, runs: Sequence[str], batch_size: int) -> Path:
        """Where a measurement of windows int64 ``[n, T + 1]`` is kept."""
        what = json.dumps([self.of, list(windows.shape), list(runs), batch_size]).encode()
        digest = hashlib.sha256(what + windows.cpu().contiguous().numpy().tobytes()).hexdigest()
        return self.folder / f"{digest[:32]}.safetensors"

    @staticmethod
    def write(path: Path, batches: int, sums: dict[str, Sums]) -> None:
        """Keep what ``batches`` batches have given; where nothing can be written, nothing is kept."""
        numbers = {name: [each.kl, each.agreed] for name, each in sums.items()}
        tensors = {name: each.nll for name, each in sums.items()}
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, save(tensors, {"batches": str(batches), "numbers": json.dumps(numbers)}))

    @staticmethod
    def read(path: Path) -> tuple[int, dict[str, Sums]]:
        """Batches and sums of a file; none where there is no whole one."""
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata()
                numbers = json.loads(about["numbers"])
                return int(about["batches"]), {name: Sums(file.get_tensor(name), *numbers[name]) for name in numbers}
        except (OSError, SafetensorError):
            return 0, {}

    def forget(self) -> None:
        """Delete the folder: everything is measured."""
        shutil.rmtree(self.folder, ignore_errors=True)

"""What a measurement ran on: versions and machine, for the record beside every number.

Knows nothing of models beyond their device and dtype.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from moe_prism import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PACKAGES = ("torch", "transformers", "numpy")


def versions() -> dict[str, str]:
    """Package name -> version of what decides the numbers, Python and moe-prism included."""
    found = {"moe-prism": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a vendored or source build without metadata
            found[package] = "unknown"
    return found


def machine(model: PreTrainedModel) -> dict[str, str | int | float]:
    """Processor, usable cores, and the device and dtype the model runs in (GPU name where it is one)."""
    described: dict[str, str | int | float] = {"cpu": cpu_name(), "cores": usable_cores()}
    if model.device.type == "cuda":
        import torch

        described["gpu"] = torch.cuda.get_device_name(model.device)
    described["device"] = model.device.type
    described["dtype"] = str(model.dtype).removeprefix("torch.")
    return described


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # a container may own fewer cores than the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str:
    """As the operating system calls the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

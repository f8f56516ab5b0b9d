"""One file that starts ``vllm serve`` with budgets: ``vllm serve --config FILE``.

Knows vLLM's option names, and imports nothing of vLLM.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from ..checkpoint.read import open_checkpoint
from ..checkpoint.schema import CONFIG_KEY
from ..errors import UnsupportedModelError
from .setup import SCHEDULER, SUPPORTED, WORKER, Options


def config_text(path: Path, options: Options, name: str | None = None) -> str:
    """The file's content.

    Args:
        path: an elastic checkpoint.
        options: of the plugin; those at their defaults are left out.
        name: what clients call the model; the directory's name by default.

    Raises:
        PrismError: not an elastic checkpoint, of a family without budgets in vLLM, or an impossible option.
    """
    checkpoint = open_checkpoint(path, verify=False)
    architectures = json.loads((path / "config.json").read_bytes()).get("architectures") or ["unknown"]
    if architectures[0] not in SUPPORTED:
        raise UnsupportedModelError(
            f"{architectures[0]} has no budgets in vLLM; supported: {', '.join(SUPPORTED)}. Serve it with "
            f"`moe-prism serve {path}`"
        )
    options.check(checkpoint.elastic.full_budget)
    given = {f.name: getattr(options, f.name) for f in fields(options) if getattr(options, f.name) != f.default}
    settings: dict[str, Any] = {
        "model": str(path.resolve()),
        "served-model-name": name or path.resolve().name,
        "worker-cls": WORKER,
        "scheduler-cls": SCHEDULER,
    }
    if given:
        settings["additional-config"] = {CONFIG_KEY: given}
    return yaml.safe_dump(settings, sort_keys=False)

"""A summary of an elastic checkpoint for people and scripts, without loading the model.

Knows nothing of how it is printed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .checksums import list_files, read_safetensors_header
from .read import open_checkpoint
from .schema import TENSORS_FILE


def describe(path: Path, verify: bool = True) -> dict[str, Any]:
    """Everything the checkpoint says about itself, ready for ``json.dumps``.

    Returns:
        ``path``; ``elastic`` (the fields of :class:`~moe_prism.checkpoint.schema.ElasticConfig`); ``files`` and
        ``bytes`` (count and total size); ``weights_bytes``; ``verified``; ``tensors`` (ours: name -> dtype and
        shape); ``recipe`` (YAML text); ``operating_points`` (the fields of
        :class:`~moe_prism.checkpoint.schema.OperatingPoints`, or None where not measured).

    Raises:
        CheckpointError: as :func:`~moe_prism.checkpoint.read.open_checkpoint`.
    """
    checkpoint = open_checkpoint(path, verify=verify)
    names = list_files(checkpoint.path)
    sizes = {name: (checkpoint.path / name).stat().st_size for name in names}
    points = checkpoint.operating_points()
    return {
        "path": str(checkpoint.path),
        "elastic": checkpoint.elastic.model_dump(mode="json"),
        "files": len(names),
        "bytes": sum(sizes.values()),
        "weights_bytes": sum(size for name, size in sizes.items() if "/" not in name and name.endswith(".safetensors")),
        "verified": verify,
        "tensors": _tensor_summary(checkpoint.path / TENSORS_FILE),
        "recipe": checkpoint.recipe(),
        "operating_points": None if points is None else points.model_dump(mode="json"),
    }


def _tensor_summary(path: Path) -> dict[str, dict[str, Any]]:
    try:
        header, _ = read_safetensors_header(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing, truncated or altered ({error}); copy it again") from error
    return {name: {"dtype": entry["dtype"], "shape": entry["shape"]} for name, entry in sorted(header.items())}

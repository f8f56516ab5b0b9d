"""SHA256SUMS in the format of sha256sum(1): ``sha256sum -c SHA256SUMS`` inside the directory says the same.

Knows nothing of what the files mean, except that a safetensors file states its own length, which tells a
truncated one from an altered one.

Names that start with a dot (and all below such a folder) are neither listed nor expected: download tools
and :mod:`~moe_prism.checkpoint.write` keep their own bookkeeping there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CheckpointError

SUMS_FILE = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(root: Path) -> list[str]:
    """Relative POSIX names of the files below ``root`` that checksums cover, sorted."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            if not name.startswith("."):
                names.append((Path(folder) / name).relative_to(root).as_posix())
    return sorted(set(names) - {SUMS_FILE})


def format_sums(sums: dict[str, str]) -> str:
    """The text of SHA256SUMS for ``{name: hex digest}``, sorted by name."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def write_sums(root: Path) -> None:
    """Hash every file below ``root`` and write its SHA256SUMS."""
    sums = {name: sha256(root / name) for name in list_files(root)}
    (root / SUMS_FILE).write_text(format_sums(sums), encoding="utf-8")


def read_sums(root: Path) -> dict[str, str]:
    """``{name: hex digest}`` of ``root``'s SHA256SUMS.

    Raises:
        CheckpointError: no such file, or a line that sha256sum(1) would not have written.
    """
    path = root / SUMS_FILE
    if not path.is_file():
        raise CheckpointError(f"{root} has no {SUMS_FILE}: the copy is incomplete; copy or write the checkpoint again")
    sums = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match is None or PurePosixPath(match[2]).is_absolute() or ".." in PurePosixPath(match[2]).parts:
            raise CheckpointError(f"{path}: line {number} is not a checksum line; copy or write the checkpoint again")
        sums[match[2]] = match[1]
    return sums


def verify_sums(root: Path, besides: Collection[str] = ()) -> None:
    """Compare every file below ``root`` with SHA256SUMS; ``besides`` names files that have checksums of their own.

    Raises:
        CheckpointError: names the files that are missing, truncated, altered, or not listed.
    """
    sums = read_sums(root)
    present = set(list_files(root)) - set(besides)
    problems = [f"{name} is missing" for name in sorted(set(sums) - present)]
    problems += [f"{name} is unexpected (not in {SUMS_FILE})" for name in sorted(present - set(sums))]
    for name in sorted(present & set(sums)):
        if sha256(root / name) != sums[name]:
            problems.append(f"{name} {_what_happened(root / name)}")
    if problems:
        raise CheckpointError(
            f"{root} is not the checkpoint that was written: {'; '.join(problems)}. "
            "Copy those files again, remove unexpected ones, or refactor anew"
        )


def read_safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header (name -> dtype, shape, data_offsets) and the file size it implies, in bytes.

    Format: 8 bytes little-endian header length, JSON header, tensor data
    (github.com/huggingface/safetensors, "Format").

    Raises:
        ValueError: not a safetensors header.
        OSError: the file cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise ValueError(f"{path.name} ends inside its header")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError(f"{path.name} has no header object")
    header.pop("__metadata__", None)
    try:
        ends = [int(entry["data_offsets"][1]) for entry in header.values()]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path.name} has a header entry without offsets: {error}") from None
    return header, 8 + length + max(ends, default=0)


def _what_happened(path: Path) -> str:
    size = path.stat().st_size
    if size == 0:
        return "is truncated to 0 bytes"
    if path.suffix == ".safetensors":
        try:
            _, implied = read_safetensors_header(path)
        except ValueError:
            return f"is truncated or altered in its header ({size} bytes are there)"
        if size < implied:
            return f"is truncated: {size} of {implied} bytes"
        return "is altered"
    return "is altered or truncated"

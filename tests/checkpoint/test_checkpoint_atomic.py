from __future__ import annotations

import os
from pathlib import Path

import pytest

from moe_prism.checkpoint.atomic import replace_file


def test_replace_file_writes_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    replace_file(file, b"old")
    inode = file.stat().st_ino
    replace_file(file, b"new")
    assert file.read_bytes() == b"new"
    assert file.stat().st_ino != inode  # a reader that had it open keeps the old content

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        replace_file(file, b"newer")
    assert file.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.json"]

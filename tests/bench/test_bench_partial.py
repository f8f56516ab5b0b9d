"""Findings outlive an interruption, and are believed only where the same was asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_prism.bench.partial import Partial

ASKED = {"machine": "m", "grid": {"batches": (1, 2)}}


def test_findings_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "partial.json"
    first = Partial(path, ASKED)
    assert "a" not in first
    first["a"] = [1, 2.5]
    again = Partial(path, ASKED)
    assert again["a"] == [1, 2.5]
    again.finish()
    assert not path.exists()
    again.finish()


@pytest.mark.parametrize("content", ["{", "[]", "{}", None])
def test_other_files_are_not_believed(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "partial.json"
    Partial(path, {**ASKED, "machine": "another"})["a"] = 1
    if content is not None:
        path.write_text(content)
    assert "a" not in Partial(path, ASKED)


def test_without_a_path_nothing_is_written(tmp_path: Path) -> None:
    kept = Partial(None, ASKED)
    kept["a"] = 1
    kept.finish()
    assert kept["a"] == 1
    assert not list(tmp_path.iterdir())

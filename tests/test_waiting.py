"""How threads wait is said once, and the user's word counts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_prism.waiting import BRIEFLY, brief_waiting


def test_a_user_who_says_something_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BRIEFLY:
        monkeypatch.delenv(name, raising=False)
    assert brief_waiting() == BRIEFLY
    for name in BRIEFLY:
        with monkeypatch.context() as said:
            said.setenv(name, "ACTIVE")
            assert brief_waiting() == {}


def test_the_makefile_says_the_same() -> None:
    text = (Path(__file__).parents[1] / "Makefile").read_text()
    exported = dict(re.findall(r"^export (\w+) := (\w+)$", text, re.MULTILINE))
    assert BRIEFLY.items() <= exported.items()

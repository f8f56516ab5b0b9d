"""Makes the test helpers importable from every folder and finds the shared texts, if they are there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from moe_prism.waiting import brief_waiting

os.environ.update(brief_waiting())  # before torch
sys.path.insert(0, str(Path(__file__).parent))

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with texts and task sets, which does not travel with the project."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no test texts at {folder}")
    return folder

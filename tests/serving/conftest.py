from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from making import recipe, save_stock
from serving_live import Live, live_server

import moe_prism


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny elastic checkpoint: full budget 16, 96 tokens, a context of 1,024."""
    folder = tmp_path_factory.mktemp("serving")
    stock = save_stock(folder / "stock", max_position_embeddings=1024)
    moe_prism.make_elastic(stock, folder / "elastic", recipe())
    return folder / "elastic"


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[Live]:
    """One server for all tests that do it no harm."""
    with live_server(checkpoint) as live:
        yield live

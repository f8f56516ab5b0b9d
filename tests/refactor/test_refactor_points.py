"""Proposed points: as far apart as they need to be, no further, and stored in the recipe."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import recipe, save_stock

from moe_prism.checkpoint.read import open_checkpoint
from moe_prism.evaluation.points import RunResult
from moe_prism.refactor import Recipe, make_elastic
from moe_prism.refactor import points as module
from moe_prism.refactor.points import MARGIN, probes_of, proposed


def steps(gain: float, deviation: float, full: int, tokens: int = 4000) -> dict[int, RunResult]:
    """Losses of budgets 1..full whose units each gain the same, with independent noise of that deviation."""
    rng = np.random.default_rng(0)
    nll, series = np.full(tokens, 1.0), {}
    for k in range(full, 0, -1):
        series[k] = RunResult(nll.astype(np.float32), 0.0, 1.0)
        noise = rng.normal(size=tokens)
        nll = nll + gain + deviation * (noise - noise.mean()) / noise.std()
    return series


@pytest.mark.parametrize("tokens", [100, 300, 1000])
def test_points_are_as_near_as_the_tokens_allow(tokens: int) -> None:
    gain, deviation = 0.0205, 0.2
    # n units differ by n gain with a standard error of sqrt(n / tokens) deviation
    apart = math.ceil((MARGIN * deviation / gain) ** 2 / tokens)
    found = proposed(steps(gain, deviation, 64), tokens)
    assert found == sorted(range(64, 0, -apart))


def test_what_was_not_measured_is_interpolated() -> None:
    series = steps(0.02, 0.2, 64)
    coarse = {k: series[k] for k in (1, 4, 16, 40, 64)}
    fine, found = proposed(series, 400), proposed(coarse, 400)
    assert abs(len(fine) - len(found)) <= 2
    assert found[-1] == 64


def test_no_gain_no_point() -> None:
    assert proposed(steps(-0.01, 0.1, 8), 10_000) == [8]


@given(st.integers(1, 400))
def test_probes_cover_the_dial(full: int) -> None:
    found = probes_of(full)
    assert found[0] == 1
    assert found[-1] == full
    assert found == sorted(set(found))


def test_a_checkpoint_names_its_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "proposed", lambda series, tokens: [2, max(series)] if tokens == 5000 else [])
    stock = save_stock(tmp_path / "stock")
    done = make_elastic(stock, tmp_path / "out", recipe(points="auto", points_tokens=5000))
    assert done.recipe.points == [0.125, 1.0]
    stored = Recipe.parse(open_checkpoint(tmp_path / "out").recipe())
    assert stored == done.recipe
    assert stored.budgets(16) == [2, 16]

"""Layer budgets: the best allocation of every mean, never dearer than the mean, stored and resumable."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making import logits, recipe
from tiny import tiny_model

import moe_prism
from moe_prism.elastic import attach, budget
from moe_prism.elastic.budgets import elastic_layers
from moe_prism.refactor import refactor_model, tune
from moe_prism.refactor.layer_budgets import gain_of_units, spread

MEASURED = {"layer_budgets": "measured", "solver": "importance", "compensation_budgets": 2}


@given(st.integers(2, 3), st.integers(2, 4), st.data())
def test_every_mean_is_spread_as_well_as_it_can_be(layers: int, full: int, data: st.DataObject) -> None:
    gain = st.lists(st.floats(0, 10), min_size=full - 1, max_size=full - 1)
    gains = [np.array(sorted(data.draw(gain), reverse=True)) for _ in range(layers)]
    rows = spread(gains)
    assert len(rows) == full
    assert rows[-1] == [full] * layers
    for k, row in enumerate(rows, 1):
        assert sum(row) == k * layers
        every = (each for each in itertools.product(range(1, full + 1), repeat=layers) if sum(each) == k * layers)
        best = max(sum(g[: b - 1].sum() for g, b in zip(gains, each, strict=True)) for each in every)
        assert sum(g[: b - 1].sum() for g, b in zip(gains, row, strict=True)) == pytest.approx(best)
    for low, high in itertools.pairwise(rows):
        assert all(a <= b for a, b in zip(low, high, strict=True))


def test_gains_go_through_what_was_measured_and_never_rise() -> None:
    found = gain_of_units([1.5, 3.5, 7.5], [0.8, 0.2, 0.4], 16)
    assert found[[0, 2, 6, 14]] == pytest.approx([0.8, 0.2, 0.2, 0.2])
    assert found[1] == pytest.approx(0.4)  # half-way between, as logarithms
    assert (gain_of_units([1.5, 3.5], [-1.0, 0.0], 8) > 0).all()


def test_a_checkpoint_spreads_its_budgets_and_costs_no_more(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    done, _ = refactor_model(model, None, recipe(**MEASURED), tmp_path / "out")
    table = done.elastic.layer_budgets
    assert table is not None
    uniform = tiny_model("olmoe")
    plain, _ = refactor_model(uniform, None, recipe(**MEASURED | {"layer_budgets": "uniform"}), tmp_path / "plain")
    attach(model, done.elastic, done.tensors)
    attach(uniform, plain.elastic, plain.tensors)
    for k in range(1, 17):
        assert sum(table[k - 1]) == 2 * k
        assert max(moe_prism.cost_shares(model, k)) <= max(moe_prism.cost_shares(uniform, k)) + 1e-9
    with budget(model, 16):
        torch.testing.assert_close(logits(model), logits(tiny_model("olmoe")), atol=1e-5, rtol=1e-5)
    # What a layer puts out at its own budget does not depend on where the budget came from.
    k = next(k for k, row in enumerate(table, 1) if row[0] != row[1])
    first = (
        next(layer.module for layer, _ in elastic_layers(model)),
        next(layer.module for layer, _ in elastic_layers(uniform)),
    )
    x, index, weights = torch.randn(6, 32), torch.randint(0, 8, (6, 4)), torch.rand(6, 4)
    with torch.no_grad(), budget(model, k), budget(uniform, table[k - 1][0]):
        torch.testing.assert_close(first[0](x, index, weights), first[1](x, index, weights))


def test_what_was_measured_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = refactor_model(tiny_model("olmoe"), None, recipe(**MEASURED), tmp_path / "out")
    monkeypatch.setattr(tune, "choose_layer_budgets", None)
    again, _ = refactor_model(tiny_model("olmoe"), None, recipe(**MEASURED), tmp_path / "out")
    assert again.elastic == expected.elastic

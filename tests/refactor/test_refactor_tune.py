"""Spending and compensation: measured, fitted, resumable, and gone from the model afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from making import elastic_model, recipe
from tiny import tiny_model

from moe_prism.elastic import attach, budget
from moe_prism.elastic.budgets import elastic_layers
from moe_prism.elastic.compensation import FITTED, Compensation, OutputScale
from moe_prism.errors import PrismError
from moe_prism.experts import find_expert_layers
from moe_prism.experts.packing import pack, packed_rows, unpack
from moe_prism.refactor import refactor_model, tune
from moe_prism.refactor.compensate import budgets_to_fit, fit_compensation
from moe_prism.refactor.spend import scan_of

CHANGES = {"neurons": "gate-first", "solver": "importance", "compensation_budgets": 2}


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_unpack_undoes_pack(family: str) -> None:
    module = find_expert_layers(tiny_model(family))[0].module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    pack(module)
    assert packed_rows(module) is not None
    unpack(module)
    for name, value in module.state_dict().items():
        assert value.is_contiguous()
        assert torch.equal(value, before[name])


def test_budgets_to_fit_are_inside_the_dial() -> None:
    assert budgets_to_fit(16, 3) == [4, 8, 12]
    assert budgets_to_fit(4, 9) == [1, 2, 3]


def test_scan_stays_payable() -> None:
    assert scan_of([2.6] * 16, 4, 1) == scan_of([2.6] * 16, 4, 2) == [2, 5, 8, 10, 13, *[16] * 11]
    assert scan_of([2.6] * 16, 4, 4) == [1, 4, 7, 10, 13, *[16] * 11]  # what is left must pay for a whole sub-expert


def test_the_model_is_stock_again(tmp_path: Path) -> None:
    model = tiny_model("olmoe")
    implementation = model.config._experts_implementation
    refactor_model(model, None, recipe(**CHANGES), tmp_path / "out")
    assert model.config._experts_implementation == implementation
    assert all(value.is_contiguous() for value in model.state_dict().values())
    assert "set_budget" not in model.__dict__
    assert all("_moe_prism" not in layer.module.__dict__ for layer in find_expert_layers(model))


def test_vectors_are_the_least_squares_solution_of_one_layer(tmp_path: Path) -> None:
    """The first layer's inputs do not depend on the fit: its vectors must solve the problem by themselves."""
    torch.manual_seed(0)
    model = elastic_model("olmoe", tmp_path, neurons="gate-first", solver="importance")
    windows = torch.randint(0, 96, (8, 32))
    layer, state = elastic_layers(model)[0]
    for each, its in elastic_layers(model):
        its.compensation = Compensation(torch.zeros(1, each.num_experts, each.hidden_size), [8], 16)
    seen = []

    def hook(module, args, kwargs, out):
        seen.append(((*args, *kwargs.values())[:3], out))

    handle = layer.module.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(windows)
        with budget(model, 8):
            model(windows)
    handle.remove()
    (_, full), ((_, index, weights), budgeted) = seen
    routed = torch.zeros(len(index), layer.num_experts).scatter_(1, index, weights)
    expected = torch.linalg.lstsq(routed.double(), (full - budgeted).double()).solution
    found = fit_compensation(model, windows, 0, 8)[layer.name]
    best = (full - budgeted - routed @ expected.float()).square().sum()
    ours = (full - budgeted - routed @ found).square().sum()
    assert ours < best * 1.01  # the ridge costs next to nothing
    assert ours < (full - budgeted).square().sum()
    assert state.compensation is not None


def test_scale_and_shift_are_the_least_squares_solution_and_refitting_changes_little(tmp_path: Path) -> None:
    """Against lstsq per dimension in the first layer, whose inputs do not depend on the fit; from a bad first guess."""
    torch.manual_seed(0)
    model = elastic_model("olmoe", tmp_path, neurons="gate-first", solver="importance")
    windows = torch.randint(0, 96, (8, 32))
    layer, state = elastic_layers(model)[0]
    for each, its in elastic_layers(model):
        its.compensation = OutputScale(torch.full((1, 2, each.hidden_size), 0.3), [8], 16)
    seen = []

    def hook(module, args, kwargs, out):
        seen.append(out)

    fit_compensation(model, windows, 0, 8)
    found = fit_compensation(model, windows, 0, 8)[layer.name]
    handle = layer.module.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(windows)
        with budget(model, 8):
            model(windows)
            fitted, state.compensation = state.compensation, None
            model(windows)
    handle.remove()
    full, corrected, plain = (out.double() for out in seen)
    torch.testing.assert_close(corrected, plain * (1 + found[0]) + found[1], atol=1e-5, rtol=1e-4)
    for d in range(layer.hidden_size):
        design = torch.stack([plain[:, d], torch.ones(len(plain), dtype=torch.float64)], dim=1)
        best = torch.linalg.lstsq(design, full[:, d : d + 1]).solution
        least = (full[:, d : d + 1] - design @ best).square().sum()
        assert (full[:, d] - corrected[:, d]).square().sum() < least * 1.01
    assert fitted is not None


def test_what_recalibration_needs() -> None:
    with pytest.raises(PrismError, match="scale needs compensation_budgets of 1 or more"):
        recipe(recalibration="scale")
    with pytest.raises(PrismError, match="renormalise fits nothing; set compensation_budgets: 0"):
        recipe(recalibration="renormalise", compensation_budgets=2)


@pytest.mark.parametrize("how", [*FITTED])
def test_it_goes_on_where_it_stopped(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = CHANGES | {"recalibration": how}
    expected, _ = refactor_model(tiny_model("olmoe"), None, recipe(**changes), tmp_path / "whole")
    real, calls = tune.fit_compensation, []

    def dies(*args, **kwargs):
        calls.append(args[3])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(tune, "fit_compensation", dies)
    with pytest.raises(KeyboardInterrupt):
        refactor_model(tiny_model("olmoe"), None, recipe(**changes), tmp_path / "cut")
    monkeypatch.setattr(tune, "choose_scan", None)  # settled already
    again, _ = refactor_model(tiny_model("olmoe"), None, recipe(**changes), tmp_path / "cut")
    assert calls == [11, 5, 5]
    assert again.elastic == expected.elastic
    assert again.tensors.keys() == expected.tensors.keys()
    for name, value in expected.tensors.items():
        torch.testing.assert_close(again.tensors[name], value)
    model = tiny_model("olmoe")
    done, _ = refactor_model(model, None, recipe(**changes), tmp_path / "cut")
    attach(model, done.elastic, done.tensors)


def test_scales_that_nothing_reads_are_not_stored(tmp_path: Path) -> None:
    done, _ = refactor_model(tiny_model("olmoe"), None, recipe(), tmp_path / "out")
    assert not [name for name in done.tensors if "scale" in name or "compensation" in name]

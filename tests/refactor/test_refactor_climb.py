"""Rungs are chosen by measurement, kept when a run stops, and survive the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from making import elastic_model, logits, recipe, save_stock
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from moe_prism import load_elastic, make_elastic
from moe_prism.checkpoint.checksums import write_sums
from moe_prism.elastic import attach, budget
from moe_prism.elastic.ladder import LadderPlan, rung_within
from moe_prism.errors import CheckpointError
from moe_prism.evaluation.measure import Run, measure
from moe_prism.refactor import climb, refactor_model, tune
from moe_prism.refactor.climb import choose_rungs, rungs_of
from moe_prism.refactor.spend import spending

CHANGES = {"neurons": "gate-first", "solver": "importance", "shadow_bits": 4}


def test_the_best_of_what_was_tried_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = elastic_model("olmoe", tmp_path, **CHANGES)
    monkeypatch.setattr(climb, "SHARES", (0.125, 0.25))
    monkeypatch.setattr(climb, "SCANS", (1.0,))
    windows = torch.randint(0, 96, (8, 32))
    found = choose_rungs(model, windows, 4)
    for k in (2, 4):
        tried = [rungs_of([1.0] * 15, [ratio] * 15, 16, 4) for ratio in climb.RATIOS]
        runs = [
            Run(str(i), lambda rungs=rungs, k=k: spending(model, k, LadderPlan(rungs, 4)))
            for i, rungs in enumerate(tried)
        ]
        measured = measure(model, windows, runs)
        least = min(measured[run.name].kl for run in runs)
        kl = [measured[str(i)].kl for i, rungs in enumerate(tried) if rungs[k - 1] == found[k - 1]]
        assert min(kl) == pytest.approx(least)


def test_rungs_of_follow_scans_and_ratios() -> None:
    found = rungs_of([1.0, 0.5, 1.0], [0.0, 0.1, 1.0], 4, 8)
    assert found[0] == rung_within(1, 4, 8, 0.0)  # three sub-experts' bytes pay for all four gates
    assert found[1] == rung_within(2, 2, 8, 0.1)
    assert found[2] == rung_within(3, 4, 8, 1.0)


def test_it_goes_on_where_it_stopped_and_survives_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = CHANGES | {"compensation_budgets": 1}
    with monkeypatch.context() as patch:
        patch.setattr(tune, "fit_compensation", None)  # dies after the rungs were chosen
        with pytest.raises(TypeError):
            refactor_model(tiny_model("olmoe"), None, recipe(**changes), tmp_path / "cut")
    with monkeypatch.context() as patch:
        patch.setattr(tune, "choose_rungs", None)  # settled already
        model = tiny_model("olmoe")
        again, _ = refactor_model(model, None, recipe(**changes), tmp_path / "cut")
    stock = save_stock(tmp_path / "stock")
    out = tmp_path / "out"
    whole = make_elastic(stock, out, recipe(**changes))
    assert again.elastic.ladder == whole.elastic.ladder
    assert again.tensors.keys() == whole.tensors.keys()
    for name, value in whole.tensors.items():
        torch.testing.assert_close(again.tensors[name], value)
    attach(model, again.elastic, again.tensors)
    loaded = load_elastic(out)
    for k_active in (2, 5, 12):
        with budget(model, k_active), budget(loaded, k_active):
            torch.testing.assert_close(logits(model), logits(loaded), atol=1e-5, rtol=1e-4)


def test_a_checkpoint_without_its_shadow_is_refused(tmp_path: Path) -> None:
    stock = save_stock(tmp_path / "stock")
    make_elastic(stock, tmp_path / "out", recipe(**CHANGES))
    file = tmp_path / "out" / "moe_prism" / "tensors.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".shadow.down." in name]:
        del tensors[name]
    save_file(tensors, file)
    write_sums(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"no tensor .*shadow.down.upper"):
        load_elastic(tmp_path / "out")

"""The cost model inside a checkpoint: checksums stay right, and other weights, machines and engines are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from making import save_stock
from scheduling_samples import FULL, SUB_EXPERTS, cost_model, steps

from moe_prism.checkpoint.read import open_checkpoint
from moe_prism.errors import PrismError
from moe_prism.refactor import make_elastic
from moe_prism.refactor.recipe import Recipe
from moe_prism.scheduling.cost_file import (
    from_record,
    load_cost_model,
    read_cost_model,
    save_cost_model,
    to_record,
    write_cost_model,
)
from moe_prism.scheduling.cost_fit import fit_held_out


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cost")
    save_stock(folder / "stock")
    recipe = Recipe.of({"num_sub_experts": 4, "solver": "greedy", "gate": "static", "calibration_tokens": 256})
    make_elastic(str(folder / "stock"), folder / "elastic", recipe)
    return folder / "elastic"


def test_saved_loaded_and_refused_elsewhere(elastic: Path) -> None:
    checkpoint = open_checkpoint(elastic)
    with pytest.raises(PrismError, match="has no cost model; measure one with `moe-prism profile-cost`"):
        load_cost_model(checkpoint, engine="embedded", machine="m")
    with pytest.raises(PrismError, match="has no cost model"):
        read_cost_model(elastic)
    before = checkpoint.fingerprint()
    model = replace(cost_model(), engine="embedded", machine="m", checkpoint=before)
    save_cost_model(checkpoint, model)
    again = open_checkpoint(elastic)  # compares all checksums
    assert again.fingerprint() == before
    assert load_cost_model(again, engine="embedded", machine="m") == model
    assert read_cost_model(elastic) == model
    for change, name in (({"engine": "vllm"}, "engine 'embedded'"), ({"machine": "other"}, "machine 'm'")):
        with pytest.raises(PrismError, match=rf"measured for {name}, this is .*; measure here with `moe-prism profile"):
            load_cost_model(again, **({"engine": "embedded", "machine": "m"} | change))
    with pytest.raises(PrismError, match="measured for checkpoint 'abc'"):
        save_cost_model(again, replace(model, checkpoint="abc"))
    file = elastic / "moe_prism" / "cost_model.json"
    file.write_text(json.dumps(to_record(replace(model, checkpoint="abc"))))
    for refuses in (lambda: load_cost_model(again, engine="embedded", machine="m"), lambda: read_cost_model(elastic)):
        with pytest.raises(PrismError, match="measured for checkpoint 'abc'"):
            refuses()


def test_files_of_their_own(tmp_path: Path) -> None:
    write_cost_model(tmp_path / "cost.json", cost_model())
    assert read_cost_model(tmp_path / "cost.json") == cost_model()
    with pytest.raises(PrismError, match=r"none\.json cannot be read"):
        read_cost_model(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(PrismError, match=r"bad\.json is not valid JSON"):
        read_cost_model(tmp_path / "bad.json")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(PrismError, match=r"other\.json: cost model version must be 2, got 'list'"):
        read_cost_model(tmp_path / "other.json")


def test_json_there_and_back() -> None:
    loads = steps(np.random.default_rng(1), 40)
    model = fit_held_out(
        loads, [cost_model().seconds(load) for load in loads], full_budget=FULL, sub_experts=SUB_EXPERTS
    )
    assert from_record(json.loads(json.dumps(to_record(model)))) == model


def damaged(change) -> dict:
    record = to_record(cost_model())
    change(record)
    return record


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(version=1), "version must be 2, got 1"),
        (lambda r: r.pop("version"), "version must be 2, got None"),
        (lambda r: r["coefficients"].pop("touched"), "damaged"),
        (lambda r: r["coefficients"].update(more=1), "damaged"),
        (lambda r: r["coefficients"].update(touched="x"), "damaged"),
        (lambda r: r["coefficients"].update(touched=-1), "none negative"),
        (lambda r: r.pop("full_budget"), "damaged"),
        (lambda r: r.update(more=1), "damaged"),
        (lambda r: r.update(measured=[{"seconds": 1}]), "damaged"),
    ],
)
def test_a_damaged_record_is_refused(change, message) -> None:
    with pytest.raises(PrismError, match=message):
        from_record(damaged(change))

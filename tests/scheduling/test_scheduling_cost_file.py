"""The cost model inside a checkpoint: checksums stay right, and other weights, machines and engines are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from making import save_stock
from scheduling_samples import cost_model

from moe_prism.checkpoint.read import open_checkpoint
from moe_prism.errors import PrismError
from moe_prism.refactor import make_elastic
from moe_prism.refactor.recipe import Recipe
from moe_prism.scheduling.cost_file import load_cost_model, read_cost_model, save_cost_model, write_cost_model


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
    file.write_text(json.dumps(replace(model, checkpoint="abc").to_dict()))
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
    with pytest.raises(PrismError, match=r"other\.json: cost model version must be 1, got 'list'"):
        read_cost_model(tmp_path / "other.json")

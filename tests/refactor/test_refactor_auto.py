"""Recipe auto: keeps what helps on held-out text, says so, ends in time and goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from making import logits, recipe, save_stock
from tiny import tiny_model

from moe_prism.checkpoint.read import open_checkpoint
from moe_prism.elastic import load_elastic
from moe_prism.errors import PrismError
from moe_prism.evaluation.measure import RunResult
from moe_prism.refactor import auto, make_elastic, pipeline
from moe_prism.refactor.auto import METHODS, Method, split_held_out

# A few quick ones: an order, one that cannot be (N does not divide the neurons), two on top.
FEW = (
    METHODS[0]._replace(changes=METHODS[0].changes | {"num_sub_experts": 4}),
    Method("N = 5", {"num_sub_experts": 5}),
    Method("compensation", {"compensation_budgets": 2}),
    Method("layer budgets", {"layer_budgets": "measured"}),
)


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "METHODS", FEW)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stock(tmp_path_factory.mktemp("auto") / "stock")


def scripted(monkeypatch: pytest.MonkeyPatch, kl: list[float]) -> None:
    """Let the tries find these KL, one after the other."""
    left = iter(kl)

    def found(model, windows, runs):
        value = next(left)
        return {run.name: RunResult(torch.ones(4).numpy(), value, 1.0) for run in runs}

    monkeypatch.setattr(auto, "measure", found)


def test_what_helps_is_kept_and_the_checkpoint_says_so(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, [1.0, 0.5, 0.495])  # the last gains less than it must
    done = make_elastic(stock, tmp_path / "out", recipe(methods="auto", calibration_tokens=1024))
    assert done.recipe.methods == "given"
    assert done.recipe.num_sub_experts == 4
    assert (done.recipe.compensation_budgets, done.recipe.layer_budgets) == (2, "uniform")
    opened = open_checkpoint(tmp_path / "out")
    choice = opened.elastic.choice
    assert choice is not None
    assert [each.outcome for each in choice.tries][::2] == ["kept", "kept"]
    assert choice.tries[1].outcome.startswith("impossible: num_sub_experts must divide")
    assert choice.tries[3].outcome == "no better"
    assert opened.elastic.calibration.tokens == 1024 - choice.tokens  # what judges was not fitted on
    assert not list(tmp_path.glob("*.partial"))
    torch.testing.assert_close(
        logits(load_elastic(tmp_path / "out")), logits(tiny_model("olmoe")), atol=1e-5, rtol=1e-5
    )


def test_the_result_is_that_of_the_chosen_recipe_on_the_same_text(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts taken over from tries are what a run of its own computes."""
    done = make_elastic(stock, tmp_path / "out", recipe(methods="auto", calibration_tokens=1024))
    windows = pipeline.load_calibration(None, None, pipeline.load_stock(str(stock))[0], 1024, 32, 0)
    fitted, _ = split_held_out(windows.windows)
    monkeypatch.setattr(pipeline, "load_calibration", lambda *_: (fitted, windows.name))
    alone = make_elastic(stock, tmp_path / "alone", done.recipe)
    assert alone.elastic.model_copy(update={"choice": done.elastic.choice}) == done.elastic
    assert alone.tensors.keys() == done.tensors.keys()
    for name, value in alone.tensors.items():
        torch.testing.assert_close(done.tensors[name], value)


def test_it_ends_in_time_and_goes_on_where_it_stopped(
    stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = recipe(methods="auto", calibration_tokens=1024, time_limit=1e-6)
    scripted(monkeypatch, [1.0])  # there is no second one to ask for
    monkeypatch.setattr(pipeline, "write_refactored", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make_elastic(stock, tmp_path / "out", wanted)
    monkeypatch.undo()
    monkeypatch.setattr(auto, "METHODS", FEW)
    monkeypatch.setattr(auto, "measure", None)  # all tries are known
    done = make_elastic(stock, tmp_path / "out", wanted)
    assert done.elastic.choice is not None
    assert [each.outcome[:9] for each in done.elastic.choice.tries] == ["kept", *["not tried"] * 3]


def test_nothing_possible_is_an_error(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "METHODS", FEW[1:2])
    with pytest.raises(PrismError, match="none of the known methods"):
        make_elastic(stock, tmp_path / "out", recipe(methods="auto", calibration_tokens=1024))
    assert not (tmp_path / "out").exists()

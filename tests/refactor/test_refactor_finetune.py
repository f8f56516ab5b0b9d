"""Finetuning: it helps, it resumes, it leaves the model alone, and it fails without leaving anything behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from making import elastic_model, recipe, save_stock
from safetensors.torch import load_file
from tiny import tiny_model, tokens
from torch import Tensor
from transformers import PreTrainedModel

from moe_prism import make_elastic
from moe_prism.elastic import budget
from moe_prism.elastic.budgets import elastic_layers
from moe_prism.errors import PrismError
from moe_prism.refactor import finetune, refactor_model
from moe_prism.refactor.finetune import _batch
from moe_prism.refactor.finetune_recipe import Finetune
from moe_prism.refactor.finetune_tensors import trained_share
from moe_prism.refactor.workspace import Workspace

GATE_FIRST = {"neurons": "gate-first", "solver": "importance", "compensation_budgets": 2}
PAPER = {"gate": "linear", "gate_options": {"weighted": False, "reweights": True}}


def distance(model: PreTrainedModel, k_active: int, ids: Tensor) -> float:
    """KL of the full model to the budgeted one, by the layers that inference runs."""
    with torch.no_grad():
        with budget(model, 16):
            full = model(ids).logits.log_softmax(-1)
        with budget(model, k_active):
            ours = model(ids).logits.log_softmax(-1)
    return float((full.exp() * (full - ours)).sum(-1).mean())


SPREAD = GATE_FIRST | {"token_budgets": "shared", "layer_budgets": "measured"}


@pytest.mark.parametrize("changes", [GATE_FIRST, PAPER, SPREAD])
def test_distillation_brings_budgets_closer_and_leaves_full_budget_alone(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    model = elastic_model("olmoe", tmp_path, **changes)
    windows = tokens(16, 32)
    with torch.no_grad():
        full = model(windows).logits
    before = [distance(model, k_active, windows) for k_active in (4, 8)]
    work = Workspace(tmp_path / "w", {})
    found = finetune.finetune(model, windows, Finetune(steps=30, batch=8, learning_rate=0.05), 0, work)
    after = [distance(model, k_active, windows) for k_active in (4, 8)]
    assert all(b < 0.95 * a for a, b in zip(before, after, strict=True))
    with torch.no_grad():
        assert torch.equal(model(windows).logits, full)
    count, share = trained_share(found, model)
    assert count == (2 * 8 * 4 * 32 if "gate" in changes else 2 * (8 * 4 + 8 * 16 + 2 * 8 * 32))
    assert share == pytest.approx(count / model.num_parameters())


def test_cross_entropy_falls_on_the_text_that_is_trained_on(tmp_path: Path) -> None:
    model = elastic_model("olmoe", tmp_path, **PAPER)
    windows = tokens(16, 32)

    def loss() -> float:
        with torch.no_grad(), budget(model, 6):
            logits = model(windows).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))

    before = loss()
    how = Finetune(
        objective="cross-entropy", curriculum="rising", shares=(0.25, 0.5), steps=30, batch=8, learning_rate=0.05
    )
    finetune.finetune(model, windows, how, 0, Workspace(tmp_path / "w", {}))
    assert loss() < before - 0.05


def test_the_weights_of_the_checkpoint_are_those_without_finetuning(tmp_path: Path) -> None:
    stock = save_stock(tmp_path / "stock")
    make_elastic(stock, tmp_path / "plain", recipe(**GATE_FIRST))
    make_elastic(stock, tmp_path / "trained", recipe(**GATE_FIRST, finetune={"steps": 3, "batch": 2}))
    for name, value in load_file(tmp_path / "plain" / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "trained" / "model.safetensors")[name], value)
    before, after = (load_file(tmp_path / which / "moe_prism/tensors.safetensors") for which in ("plain", "trained"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        changed = name.endswith(("importance", "neuron_scale", "compensation"))
        assert torch.equal(value, after[name]) != changed, name


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {**GATE_FIRST, "finetune": {"steps": 14, "batch": 3}}
    expected, _ = refactor_model(tiny_model("olmoe"), None, recipe(**changes), tmp_path / "whole")
    stock = tiny_model("olmoe")

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("finetune", 12):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refactor_model(stock, None, recipe(**changes), tmp_path / "cut", progress=stop)
    assert all(parameter.requires_grad for parameter in stock.parameters())
    steps = []

    def seen(stage: str, done: int, total: int) -> None:
        steps.extend([done] if stage == "finetune" else [])

    again, _ = refactor_model(tiny_model("olmoe"), None, recipe(**changes), tmp_path / "cut", progress=seen)
    assert steps == [11, 12, 13, 14]
    for name, value in expected.tensors.items():
        torch.testing.assert_close(again.tensors[name], value)


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
from making import recipe
from moe_prism import make_elastic
def tell(stage, done, total):
    if (stage, done) == ("finetune", 11):
        os.kill(os.getpid(), signal.SIGKILL)
make_elastic({stock!r}, {out!r}, recipe(**{changes!r}), progress=tell)
"""


def test_kill_9_leaves_no_checkpoint_and_the_next_run_gives_the_same(tmp_path: Path) -> None:
    stock = save_stock(tmp_path / "stock")
    changes = {**PAPER, "finetune": {"steps": 12, "batch": 2}}
    out = tmp_path / "out"
    script = KILLED.format(tests=str(Path(__file__).parents[1]), stock=str(stock), out=str(out), changes=changes)
    assert subprocess.run([sys.executable, "-c", script], timeout=200).returncode == -signal.SIGKILL
    assert not out.exists()
    make_elastic(stock, out, recipe(**changes))
    make_elastic(stock, tmp_path / "whole", recipe(**changes))
    resumed, whole = (load_file(folder / "moe_prism/tensors.safetensors") for folder in (out, tmp_path / "whole"))
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value)


def test_a_loss_that_is_not_a_number_ends_with_a_message_and_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = elastic_model("olmoe", tmp_path, **GATE_FIRST)
    before = {layer.name: state.neuron_scale for layer, state in elastic_layers(model)}
    implementation = model.config._experts_implementation
    real, calls = finetune._loss, []

    def breaks(*args: Any) -> Tensor:
        calls.append(1)
        return real(*args) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(finetune, "_loss", breaks)
    work = Workspace(tmp_path / "w", {})
    with pytest.raises(PrismError, match=r"step 3 is nan, .*; lower finetune.learning_rate \(it is 0.02\)"):
        finetune.finetune(model, tokens(8, 16), Finetune(steps=5, batch=2), 0, work)
    assert model.config._experts_implementation == implementation
    for layer, state in elastic_layers(model):
        assert torch.equal(state.neuron_scale, before[layer.name])  # type: ignore[arg-type]


def test_batches_follow_from_seed_and_step_and_every_window_comes_once_an_epoch() -> None:
    windows = torch.arange(10)[:, None]
    how = Finetune(steps=5, batch=4, shares=(0.25, 0.75))
    steps = [_batch(windows, 16, how, 0, step) for step in range(5)]
    seen = torch.cat([batch.flatten() for batch, _ in steps]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert torch.equal(_batch(windows, 16, how, 0, 3)[0], steps[3][0])
    for _, budgets in steps:  # one of each quarter of the range
        assert budgets == sorted(budgets)
        assert 4 <= budgets[0] <= 6 <= 10 <= budgets[-1] <= 12
    rising = Finetune(steps=5, batch=4, shares=(0.25, 0.75), curriculum="rising")
    assert [_batch(windows, 16, rising, 0, step)[1] for step in range(5)] == [[k] * 4 for k in (4, 6, 8, 10, 12)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"finetune": {"steps": 0}}, "finetune.steps: Input should be greater than or equal to 1"),
        ({"finetune": {"objective": "magic"}}, "'cross-entropy' or 'distillation'"),
        ({"finetune": {"shares": [0.5, 1.0]}}, r"shares must ascend within \(0, 1\), got 0.5 and 1.0"),
        ({"finetune": {}, "gate": "proxy"}, "gate 'proxy' has no tensors to train"),
    ],
)
def test_bad_recipes_are_refused_before_any_work(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PrismError, match=message):
        refactor_model(tiny_model("olmoe"), None, recipe(**fields), tmp_path / "out")
    assert not list(tmp_path.iterdir())

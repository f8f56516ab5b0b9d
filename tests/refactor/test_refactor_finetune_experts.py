"""The layer with gradients: values of the elastic layer, gradients of finite differences where choices stand still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from making import elastic_model
from tiny import tokens
from torch import Tensor
from transformers import PreTrainedModel

from moe_prism.elastic import budget
from moe_prism.elastic.budgets import elastic_layers
from moe_prism.refactor.finetune_experts import IMPLEMENTATION
from moe_prism.refactor.finetune_tensors import Trainable

GATE_FIRST = {"neurons": "gate-first", "solver": "importance", "compensation_budgets": 2}
LINEAR = {"gate": "linear", "gate_options": {"weighted": False, "reweights": True}}
CASES = [
    ("olmoe", GATE_FIRST),
    ("olmoe", LINEAR),
    ("qwen3_moe", LINEAR),
    ("deepseek_v3", GATE_FIRST),
    ("gpt_oss", {"gate": "static", "compensation_budgets": 1}),
    ("gpt_oss", LINEAR),
    ("olmoe", {"gate": "proxy", "gate_options": {"gate_neurons": 2}}),
]


def loss_of(model: PreTrainedModel, k_active: Any, ids: Tensor) -> Tensor:
    with budget(model, k_active):
        logits = model(ids, use_cache=False).logits
    return -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_values_are_those_of_the_elastic_layer_at_every_budget(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = elastic_model(family, tmp_path, **changes)
    own = model.config._experts_implementation
    full = elastic_layers(model)[0][1].dial.full_budget
    for name, values in Trainable(model).changes.items():  # other values than those that were fitted
        torch.manual_seed(len(name))
        values.data.normal_(std=0.1)
    ids = tokens(4, 16)
    for k_active in [*range(1, full + 1), [1, full // 2, full - 1, full]]:
        with torch.no_grad(), budget(model, k_active):
            model.set_experts_implementation(own)
            expected = model(ids).logits
            model.set_experts_implementation(IMPLEMENTATION)
            found = model(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "name"),
    [(GATE_FIRST, "compensation"), (LINEAR, "rows")],
)
def test_gradients_are_those_of_finite_differences(changes: dict[str, Any], name: str, tmp_path: Path) -> None:
    """Of the last layer: nothing below chooses by its output, and a small change of rows changes no choice."""
    model = elastic_model("olmoe", tmp_path, **changes)
    model.requires_grad_(False)
    model.set_experts_implementation(IMPLEMENTATION)
    ids = tokens(4, 4)
    trained = Trainable(model)
    change = trained.changes[f"{elastic_layers(model)[-1][0].name}.{name}"]

    torch.manual_seed(1)
    change.data.normal_(std=0.3)  # rows as fitted are equal, and choices between equals do not stand still

    def value() -> Tensor:
        trained.put()
        return loss_of(model, [3, 6, 9, 13], ids)

    value().backward()
    assert change.grad is not None
    direction = change.grad / change.grad.square().mean().sqrt()  # along it the loss changes most, against rounding
    step = {"compensation": 0.05, "rows": 1e-3}[name]
    with torch.no_grad():
        change += step * direction
        above = value()
        change -= 2 * step * direction
        below = value()
    expected = float(above - below) / (2 * step)
    assert expected > 1e-3
    assert float((change.grad * direction).sum()) == pytest.approx(expected, rel=0.03)


def test_choices_learn_and_the_model_does_not(tmp_path: Path) -> None:
    model = elastic_model("olmoe", tmp_path, **GATE_FIRST)
    model.requires_grad_(False)
    model.set_experts_implementation(IMPLEMENTATION)
    trained = Trainable(model)
    trained.put()
    loss_of(model, [3, 6, 9, 13], tokens(4, 16)).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    names = {name.rsplit(".", 1)[1] for name in trained.changes}
    assert names == {"importance", "neuron_scale", "compensation"}
    for change in trained.changes.values():
        assert change.grad is not None
        assert change.grad.isfinite().all()
        assert change.grad.abs().max() > 0


def test_a_scale_is_pulled_the_way_that_lowers_the_loss(tmp_path: Path) -> None:
    """Straight-through gradients are estimates: over a step against them the loss must fall all the same."""
    model = elastic_model("olmoe", tmp_path, **GATE_FIRST)
    model.requires_grad_(False)
    model.set_experts_implementation(IMPLEMENTATION)
    ids = tokens(16, 32)
    trained = Trainable(model)

    def distance(k_active: int = 5) -> Tensor:
        with torch.no_grad(), budget(model, 16):
            full = model(ids).logits.log_softmax(-1)
        with budget(model, k_active):
            return (full.exp() * (full - model(ids).logits.log_softmax(-1))).sum(-1).mean()

    trained.put()
    before = distance()
    before.backward()
    for name, change in trained.changes.items():
        if name.endswith("neuron_scale"):
            assert change.grad is not None
            change.data -= 0.3 * change.grad.sign()
    with torch.no_grad():
        trained.put()
        assert distance() < before * 0.98

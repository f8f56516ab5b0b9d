"""What follows the partition: choose how budgets are spent, fit what is added to their outputs, finetune the gate.

All need the elastic model to run, so it is attached here and detached again. Knows the order of the steps and how
they resume, not how they work.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint.schema import ElasticConfig
from ..elastic import attach
from ..elastic.budgets import elastic_layers
from ..elastic.compensation import Compensation
from ..elastic.model import COMPENSATION, NEURON_SCALE, detach
from ..elastic.plan import Plan
from ..errors import PrismError
from ..experts import ExpertLayer
from ..experts.neurons import is_plain
from ..gates import Gate
from .compensate import budgets_to_fit, fit_compensation
from .finetune import finetune
from .recipe import Recipe
from .spend import choose_scan
from .workspace import Workspace


def skips_neurons(recipe: Recipe, layers: list[ExpertLayer], gate: Gate) -> bool:
    """Whether budgets will skip neurons; raises PrismError where the recipe asks for it and it is impossible."""
    reason = None
    if gate.reads_neurons:
        reason = f"gate {recipe.gate!r} computes neurons itself; use gate: static"
    elif recipe.num_sub_experts == layers[0].num_neurons:
        reason = "a sub-expert is a single neuron; lower num_sub_experts"
    elif not all(is_plain(layer.module) for layer in layers):
        reason = "the model's experts are not silu(gate) * up without biases"
    if recipe.neurons == "gate-first" and reason is not None:
        raise PrismError(f"neurons: gate-first is impossible here: {reason}; or set neurons: all")
    return recipe.neurons != "all" and reason is None


def tune(
    model: PreTrainedModel,
    windows: Tensor,
    training: Tensor | None,
    elastic: ElasticConfig,
    tensors: dict[str, Tensor],
    recipe: Recipe,
    skip: bool,
    work: Workspace,
    tell: Callable[[str, int, int], None],
) -> ElasticConfig:
    """Complete a refactored model.

    Args:
        model: permuted, stock otherwise; it is stock again on return.
        windows: calibration tokens.
        training: tokens for finetuning, where the recipe asks for it.
        elastic: what is known so far.
        tensors: by checkpoint name; compensation is added, scales that nothing reads are taken out.
        recipe: what to do.
        skip: whether budgets skip neurons.
        work: where finished steps are kept.
        tell: called with (stage, steps done, in all); stages "spend", "compensate" and "finetune".

    Returns:
        ``elastic`` with its plan.
    """
    size, full = elastic.num_neurons // elastic.num_sub_experts, elastic.full_budget
    fitted = budgets_to_fit(full, recipe.compensation_budgets) if recipe.compensation_budgets else []
    if skip or fitted or training is not None:
        implementation: str = model.config._experts_implementation
        dial = attach(model, elastic, tensors)
        try:
            if skip:
                scan = work.numbers("scan")
                if scan is None:
                    scan = choose_scan(model, windows, size, lambda done, total: tell("spend", done, total))
                    work.keep_numbers("scan", scan)
                dial.plan = Plan(scan, size)
                elastic = elastic.model_copy(update={"scan": scan})
            for layer, state in elastic_layers(model):
                zeros = torch.zeros(len(fitted), layer.num_experts, layer.hidden_size)
                state.compensation = Compensation(zeros, fitted, full) if fitted else None
            for position, k_active in reversed(list(enumerate(fitted))):
                _fit(model, windows, position, k_active, work, lambda done, total: tell("compensate", done, total))
            for layer, state in elastic_layers(model):
                if state.compensation is not None:
                    tensors[f"{layer.name}.{COMPENSATION}"] = state.compensation.vectors.cpu()
            elastic = elastic.model_copy(update={"compensated": fitted})
            if recipe.finetune is not None and training is not None:
                report = partial(tell, "finetune")
                tensors |= finetune(model, training, recipe.finetune, recipe.seed, work, report)
        finally:
            detach(model, implementation)
    if not skip:
        for name in [name for name in tensors if name.endswith(f".{NEURON_SCALE}")]:
            del tensors[name]
    return elastic


def _fit(
    model: PreTrainedModel,
    windows: Tensor,
    position: int,
    k_active: int,
    work: Workspace,
    tell: Callable[[int, int], None],
) -> None:
    kept = work.vectors(k_active)
    for layer, state in elastic_layers(model):
        assert state.compensation is not None  # the caller attached it
        vectors = state.compensation.vectors
        if kept is not None:
            vectors[position] = kept[layer.name]
        elif position + 1 < len(vectors):
            vectors[position] = vectors[position + 1]
    if kept is None:
        work.keep_vectors(k_active, fit_compensation(model, windows, position, k_active, tell))

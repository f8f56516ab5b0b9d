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
from ..elastic import attach, dial_of
from ..elastic.budgets import elastic_layers
from ..elastic.compensation import FITTED, FittedRecalibration
from ..elastic.ladder import LadderPlan, Rung
from ..elastic.model import COMPENSATION, FOLD, NEURON_SCALE, THRESHOLDS, detach
from ..elastic.plan import Plan
from ..elastic.sharing import Sharing
from ..errors import PrismError
from ..experts import ExpertLayer, find_expert_layers
from ..experts.neurons import is_plain
from ..experts.shadow import GROUP, make_shadow
from ..gates import Gate
from .climb import choose_rungs
from .compensate import budgets_to_fit, fit_compensation
from .finetune import finetune
from .fold import fit_folding
from .layer_budgets import choose_layer_budgets
from .recipe import Recipe
from .share import choose_strength, fit_thresholds
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
    elif recipe.shadow_bits and layers[0].hidden_size % GROUP:
        reason = f"shadow_bits needs a hidden size that is a multiple of {GROUP}, got {layers[0].hidden_size}"
    if recipe.neurons == "auto":
        return reason is None and recipe.gate == "static" and not recipe.fold
    if recipe.neurons == "gate-first" and reason is not None:
        raise PrismError(f"neurons: gate-first is impossible here: {reason}; or set neurons: all")
    return recipe.neurons == "gate-first"


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
        tell: called with (stage, steps done, in all); stages "spend", "fold", "compensate", "finetune", "thresholds",
            "sharing" and "layer budgets".

    Returns:
        ``elastic`` with its plan.
    """
    size, full = elastic.num_neurons // elastic.num_sub_experts, elastic.full_budget
    fitted = budgets_to_fit(full, recipe.compensation_budgets) if recipe.compensation_budgets else []
    if recipe.shadow_bits:
        for layer in find_expert_layers(model):
            for name, value in make_shadow(layer.module).tensors().items():
                tensors[f"{layer.name}.{name}"] = value
    measured, shared = recipe.layer_budgets == "measured", recipe.token_budgets == "shared"
    if skip or fitted or measured or shared or recipe.fold or training is not None:
        implementation: str = model.config._experts_implementation
        dial = attach(model, elastic, tensors)
        try:
            if recipe.shadow_bits:
                kept = work.numbers("rungs")
                if kept is None:
                    found = choose_rungs(model, windows, size, lambda done, total: tell("spend", done, total))
                    kept = [number for rung in found for number in rung]
                    work.keep_numbers("rungs", kept)
                rungs = [Rung(*kept[at : at + 3]) for at in range(0, len(kept), 3)]
                dial.plan = LadderPlan(rungs, size)
                elastic = elastic.model_copy(update={"ladder": [tuple(rung) for rung in rungs]})
            elif skip:
                scan = work.numbers("scan")
                if scan is None:
                    report = partial(tell, "spend")
                    scan = choose_scan(model, windows, size, recipe.neuron_block, report)
                    work.keep_numbers("scan", scan)
                dial.plan = Plan(scan, size, recipe.neuron_block)
                elastic = elastic.model_copy(update={"scan": scan, "neuron_block": recipe.neuron_block})
            if recipe.fold:
                factors = fit_folding(model, windows, lambda done, total: tell("fold", done, total))
                for layer, state in elastic_layers(model):
                    state.fold = tensors[f"{layer.name}.{FOLD}"] = factors[layer.name]
                elastic = elastic.model_copy(update={"folded": True})
            for layer, state in elastic_layers(model):
                if fitted:
                    kind = FITTED[recipe.recalibration]
                    zeros = torch.zeros(len(fitted), kind.rows(layer.num_experts), layer.hidden_size)
                    state.compensation = kind(zeros, fitted, full)
            for position, k_active in reversed(list(enumerate(fitted))):
                _fit(model, windows, position, k_active, work, lambda done, total: tell("compensate", done, total))
            for layer, state in elastic_layers(model):
                if isinstance(state.compensation, FittedRecalibration):
                    tensors[f"{layer.name}.{COMPENSATION}"] = state.compensation.vectors.cpu()
            elastic = elastic.model_copy(update={"compensated": fitted})
            if recipe.finetune is not None and training is not None:
                report = partial(tell, "finetune")
                tensors |= finetune(model, training, recipe.finetune, recipe.seed, work, report)
            if shared:
                elastic = elastic.model_copy(update={"sharing": _share(model, windows, tensors, work, tell)})
            if measured:
                table = work.numbers("layer_budgets")
                if table is None:
                    table = choose_layer_budgets(model, windows, lambda done, total: tell("layer budgets", done, total))
                    work.keep_numbers("layer_budgets", table)
                rows = torch.tensor(table).view(full, len(elastic.layers))
                elastic = elastic.model_copy(update={"layer_budgets": rows.tolist()})
        finally:
            detach(model, implementation)
    if not skip:
        for name in [name for name in tensors if name.endswith(f".{NEURON_SCALE}")]:
            del tensors[name]
    return elastic


def _share(
    model: PreTrainedModel,
    windows: Tensor,
    tensors: dict[str, Tensor],
    work: Workspace,
    tell: Callable[[str, int, int], None],
) -> list[float]:
    thresholds = fit_thresholds(model, windows, lambda done, total: tell("thresholds", done, total))
    for layer, state in elastic_layers(model):
        state.thresholds = tensors[f"{layer.name}.{THRESHOLDS}"] = thresholds[layer.name]
    strength = work.numbers("sharing")
    if strength is None:
        strength = choose_strength(model, windows, lambda done, total: tell("sharing", done, total))
        work.keep_numbers("sharing", strength)
    dial_of(model).sharing = Sharing(strength, len(thresholds))
    return strength


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
        assert isinstance(state.compensation, FittedRecalibration)  # the caller attached it
        vectors = state.compensation.vectors
        if kept is not None:
            vectors[position] = kept[layer.name]
        elif position + 1 < len(vectors):
            vectors[position] = vectors[position + 1]
    if kept is None:
        work.keep_vectors(k_active, fit_compensation(model, windows, position, k_active, tell))

"""A transformers model becomes elastic: state is attached to its expert layers, and a dial to the model.

The model's own weights are used where they are. Knows nothing of how a checkpoint was made.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import cached_file

from .._on_import import IMPLEMENTATION
from ..checkpoint.read import open_checkpoint
from ..checkpoint.schema import CONFIG_KEY, TENSORS_FILE, ElasticConfig, parse_elastic_config
from ..errors import CheckpointError
from ..experts import find_expert_layers
from ..experts.neurons import is_plain
from ..experts.packing import pack, unpack
from ..experts.shadow import Shadow
from ..gates import GATES
from .budgets import HOOKS, budget, set_budget
from .compensation import recalibration
from .dial import Dial, named_points, spread_table
from .executors import AUTO, EXECUTORS
from .executors.panels import PANELS
from .fingerprint import matches
from .ladder import LadderPlan, Rung
from .layer import ElasticLayer
from .layout import in_huge_pages, use_linear_panels, use_panels, use_rows
from .linear import use_fast_linear
from .norms import use_fast_norms
from .plan import Plan
from .sharing import Sharing

# What attach_on_demand read, by the id of a living config: an attribute would be saved with the config.
_LOADED: dict[int, tuple[ElasticConfig, dict[str, Tensor], Dial]] = {}
FINGERPRINT = "fingerprint"
PERMUTATION = "permutation"
NEURON_SCALE = "neuron_scale"
COMPENSATION = "compensation"
FOLD = "fold"
THRESHOLDS = "thresholds"


def attach(model: nn.Module, elastic: ElasticConfig, tensors: dict[str, Tensor], *, same_weights: bool = True) -> Dial:
    """Make a loaded model elastic; its dial starts at full budget.

    Args:
        model: permuted weights, any floating-point dtype.
        elastic: sizes, gate and layer names.
        tensors: ``{layer}.{name}`` of every layer.
        same_weights: check that the gate was made for these weights, which must be in memory then.

    Raises:
        CheckpointError: a layer is missing, or its weights are not those the gate was made for.
    """
    dial = dial_for(elastic)
    layers = {layer.name: layer for layer in find_expert_layers(model)}
    for name in elastic.layers:
        if name not in layers:
            raise CheckpointError(f"the model has no layer {name}, which the checkpoint describes")
        module = layers[name].module
        if same_weights:
            check_weights(module, name, tensors)
        attach_layer(module, name, dial, elastic, tensors)
    if isinstance(model, PreTrainedModel):
        model.set_experts_implementation(IMPLEMENTATION)
        for method in (set_budget, _generate):
            model.__dict__[method.__name__.lstrip("_")] = MethodType(method, model)
    return dial


def check_weights(module: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError if a layer's weights are not those that its gate was made for."""
    if not matches(module, _tensor(tensors, f"{name}.{FINGERPRINT}")):
        raise CheckpointError(f"the weights of {name} are not those that its gate was made for; load the original")


def attach_on_demand(module: nn.Module) -> ElasticLayer:
    """State for a module of a model that came from plain ``from_pretrained``.

    Finds the checkpoint by the path in the module's config and the layer by its fingerprint.
    """
    config: Any = module.config
    path = getattr(config, "_name_or_path", "")
    raw = getattr(config, CONFIG_KEY, None)
    if raw is None:
        raise CheckpointError(
            f'{path or "this model"} has no key "{CONFIG_KEY}" in its config: it is a stock model. '
            "Make it elastic first: moe-prism refactor MODEL OUT"
        )
    cached = _LOADED.get(id(config))
    if cached is None:
        elastic = parse_elastic_config(raw)
        file = cached_file(path, TENSORS_FILE)
        cached = (elastic, load_file(str(file)), dial_for(elastic))
        _LOADED[id(config)] = cached
        weakref.finalize(config, _LOADED.pop, id(config), None)
    elastic, tensors, dial = cached
    for name in elastic.layers:
        if matches(module, _tensor(tensors, f"{name}.{FINGERPRINT}")):
            return attach_layer(module, name, dial, elastic, tensors)
    raise CheckpointError(f"{path}: these expert weights match no layer of the checkpoint; they were altered")


def attach_layer(
    module: nn.Module, name: str, dial: Dial, elastic: ElasticConfig, tensors: dict[str, Tensor]
) -> ElasticLayer:
    """Make one stacked experts module elastic, whatever model it is of; its weights are packed in place.

    Args:
        module: permuted weights.
        name: of the layer, one of ``elastic.layers``.
        dial: of the model.
        elastic: sizes and gate.
        tensors: ``{layer}.{name}``.

    Raises:
        CheckpointError: a tensor is missing, or the layer cannot do what the checkpoint asks for.
    """
    prefix = f"{name}."
    mine = {
        key[len(prefix) :]: value
        for key, value in tensors.items()
        if key.startswith(prefix) and key[len(prefix) :] not in (FINGERPRINT, PERMUTATION)
    }
    gate = GATES.create(elastic.gate, elastic.gate_options)
    scale, vectors = mine.pop(NEURON_SCALE, None), mine.pop(COMPENSATION, None)
    thresholds, fold = mine.pop(THRESHOLDS, None), mine.pop(FOLD, None)
    if elastic.folded and (fold is None or fold.shape != (elastic.num_experts, elastic.num_sub_experts + 1)):
        raise CheckpointError(f"{TENSORS_FILE} has no tensor {prefix}{FOLD} for the weights to be scaled by")
    if elastic.sharing is not None and (thresholds is None or len(thresholds) != elastic.full_budget + 1):
        raise CheckpointError(f"{TENSORS_FILE} has no tensor {prefix}{THRESHOLDS} for tokens that share budgets")
    if elastic.scan is not None and (scale is None or not is_plain(module)):
        raise CheckpointError(f"the checkpoint skips neurons, but {name} has no {NEURON_SCALE}, or cannot skip any")
    if elastic.compensated and (vectors is None or len(vectors) != len(elastic.compensated)):
        raise CheckpointError(f"{TENSORS_FILE} has no tensor {prefix}{COMPENSATION} for the compensated budgets")
    try:
        shadow = Shadow.take(mine)
    except KeyError as missing:
        raise CheckpointError(f"{TENSORS_FILE} has no tensor {prefix}{missing.args[0]}; it is incomplete") from None
    if elastic.ladder is not None and (shadow is None or scale is None or not is_plain(module)):
        raise CheckpointError(f"the checkpoint reads few bits, but {name} has no shadow, or cannot skip neurons")
    state = ElasticLayer(
        name, dial, gate, mine, elastic.num_sub_experts, scale, shadow=shadow, number=elastic.layers.index(name)
    )
    state.compensation = recalibration(elastic.recalibration, vectors, elastic.compensated, elastic.full_budget)
    state.thresholds, state.fold = thresholds, fold
    pack(module)
    module.__dict__["_moe_prism"] = state
    return state


def dial_for(elastic: ElasticConfig) -> Dial:
    """The dial of a model of this checkpoint, at full budget."""
    dial = Dial(elastic.full_budget)
    if elastic.scan is not None:
        dial.plan = Plan(elastic.scan, elastic.num_neurons // elastic.num_sub_experts, elastic.neuron_block)
    if elastic.ladder is not None:
        dial.plan = LadderPlan([Rung(*rung) for rung in elastic.ladder], elastic.num_neurons // elastic.num_sub_experts)
    if elastic.layer_budgets is not None:
        dial.spread = spread_table(elastic.layer_budgets)
    if elastic.sharing is not None:
        dial.sharing = Sharing(elastic.sharing, len(elastic.layers))
    return dial


def detach(model: PreTrainedModel, implementation: str) -> None:
    """Undo ``attach``: a stock model again, with its weights in the stock layout and that experts implementation."""
    for module in model.modules():
        use_rows(module)
    for layer in find_expert_layers(model):
        layer.module.__dict__.pop("_moe_prism", None)
        unpack(layer.module)
    for hook in getattr(model, "base_model", model).__dict__.pop(HOOKS, ()):
        hook.remove()
    for method in (set_budget, _generate):
        model.__dict__.pop(method.__name__.lstrip("_"), None)
    model.set_experts_implementation(implementation)


def _generate(model: PreTrainedModel, *args: Any, k_active: Any = None, **kwargs: Any) -> Any:
    """transformers' ``generate`` with one argument more: the budget, or one for every prompt of the batch."""
    if k_active is None:
        return type(model).generate(model, *args, **kwargs)  # type: ignore[attr-defined]
    with budget(model, k_active):
        return type(model).generate(model, *args, **kwargs)  # type: ignore[attr-defined]


def _tensor(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{TENSORS_FILE} has no tensor {name}; the checkpoint is incomplete")
    return tensors[name]


def load_elastic(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    verify: bool = True,
    executor: str = AUTO,
    fast_linear: bool = True,
    panels: bool = True,
) -> PreTrainedModel:
    """Load an elastic checkpoint with transformers, at full budget, for inference.

    The model gets ``set_budget`` as a method, and its ``generate`` takes ``k_active``.

    Args:
        path: directory of the checkpoint.
        dtype: of the weights in memory; "auto" keeps the stored one.
        verify: compare all files with SHA256SUMS first.
        executor: what runs the experts: "auto" takes the fastest that can; or a registered name.
        fast_linear: on a CPU, run the other linear layers of a decode step, and the usual norms, by compiled kernels
            too.
        panels: lay bfloat16 weights out in panels if this CPU is faster on them (``elastic.layout``): the experts'
            where budgets run whole sub-experts, and those of fast linear layers. Only tokens in bfloat16 without
            gradients can run then.

    Raises:
        CheckpointError: not an elastic checkpoint, or an altered one.
    """
    if executor != AUTO:
        EXECUTORS.get(executor)
    checkpoint = open_checkpoint(Path(path), verify=verify)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=dtype, experts_implementation=IMPLEMENTATION
    )
    model.eval().requires_grad_(False)  # kernels have no gradients
    in_huge_pages(model)
    dial = attach(model, checkpoint.elastic, checkpoint.tensors())
    dial.executor = executor
    measured = checkpoint.operating_points()
    if measured is not None:
        dial.points = named_points(dial.full_budget, {point.k_active: point.nll for point in measured.elastic})
    if fast_linear:
        use_fast_linear(model)
        use_fast_norms(model)
        if panels:
            use_linear_panels(model)
    whole = runs_whole_sub_experts(checkpoint.elastic) and not GATES.get(checkpoint.elastic.gate).reads_weights
    if panels and executor in (AUTO, PANELS) and whole:
        for layer in find_expert_layers(model):
            use_panels(layer.module, checkpoint.elastic.num_sub_experts)
    return model


def runs_whole_sub_experts(elastic: ElasticConfig) -> bool:
    """Whether every budget does, so that but for gates weights serve nothing but products with tokens."""
    return elastic.scan is None and elastic.ladder is None

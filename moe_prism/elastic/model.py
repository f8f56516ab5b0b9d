"""A transformers model becomes elastic: state is attached to its expert layers, and a dial to the model.

The model's own weights are used where they are. Knows nothing of how a checkpoint was made.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import cached_file

from .._on_import import IMPLEMENTATION
from ..checkpoint.read import open_checkpoint
from ..checkpoint.schema import CONFIG_KEY, TENSORS_FILE, ElasticConfig, parse_elastic_config
from ..errors import CheckpointError, PrismError, UnsupportedModelError
from ..experts import ExpertLayer, find_expert_layers
from ..gates import GATES, LayerShape
from .dial import Dial
from .fingerprint import matches
from .layer import ElasticLayer, require_state, state_of

# What attach_on_demand read, by the id of a living config: an attribute would be saved with the config.
_LOADED: dict[int, tuple[ElasticConfig, dict[str, Tensor], Dial]] = {}
FINGERPRINT = "fingerprint"
PERMUTATION = "permutation"


class CostShares(NamedTuple):
    """Work of a budget, gate included, over the routed-expert work of the original model."""

    flops: float
    bytes: float


def attach(model: nn.Module, elastic: ElasticConfig, tensors: dict[str, Tensor]) -> Dial:
    """Make a loaded model elastic; its dial starts at full budget.

    Args:
        model: permuted weights, any floating-point dtype.
        elastic: sizes, gate and layer names.
        tensors: ``{layer}.{name}`` of every layer.

    Raises:
        CheckpointError: a layer is missing, or its weights are not those the gate was made for.
    """
    dial = Dial(elastic.full_budget)
    layers = {layer.name: layer for layer in find_expert_layers(model)}
    for name in elastic.layers:
        if name not in layers:
            raise CheckpointError(f"the model has no layer {name}, which the checkpoint describes")
        module = layers[name].module
        if not matches(module, _tensor(tensors, f"{name}.{FINGERPRINT}")):
            raise CheckpointError(f"the weights of {name} are not those that its gate was made for; load the original")
        _attach_one(module, name, dial, elastic, tensors)
    if isinstance(model, PreTrainedModel):
        model.set_experts_implementation(IMPLEMENTATION)
    return dial


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
        cached = (elastic, load_file(str(file)), Dial(elastic.full_budget))
        _LOADED[id(config)] = cached
        weakref.finalize(config, _LOADED.pop, id(config), None)
    elastic, tensors, dial = cached
    for name in elastic.layers:
        if matches(module, _tensor(tensors, f"{name}.{FINGERPRINT}")):
            return _attach_one(module, name, dial, elastic, tensors)
    raise CheckpointError(f"{path}: these expert weights match no layer of the checkpoint; they were altered")


def _attach_one(
    module: nn.Module, name: str, dial: Dial, elastic: ElasticConfig, tensors: dict[str, Tensor]
) -> ElasticLayer:
    prefix = f"{name}."
    mine = {
        key[len(prefix) :]: value
        for key, value in tensors.items()
        if key.startswith(prefix) and key[len(prefix) :] not in (FINGERPRINT, PERMUTATION)
    }
    gate = GATES.create(elastic.gate, elastic.gate_options)
    state = ElasticLayer(name, dial, gate, mine, elastic.num_sub_experts)
    module.__dict__["_moe_prism"] = state
    return state


def _tensor(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{TENSORS_FILE} has no tensor {name}; the checkpoint is incomplete")
    return tensors[name]


def load_elastic(path: str | Path, *, dtype: str | torch.dtype = "auto", verify: bool = True) -> PreTrainedModel:
    """Load an elastic checkpoint with transformers, at full budget, in eval mode.

    Args:
        path: directory of the checkpoint.
        dtype: of the weights in memory; "auto" keeps the stored one.
        verify: compare all files with SHA256SUMS first.

    Raises:
        CheckpointError: not an elastic checkpoint, or an altered one.
    """
    checkpoint = open_checkpoint(Path(path), verify=verify)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(path), dtype=dtype, experts_implementation=IMPLEMENTATION
    )
    model.eval()
    attach(model, checkpoint.elastic, checkpoint.tensors())
    return model


def _layers(model: nn.Module) -> list[tuple[ExpertLayer, ElasticLayer]]:
    found = find_expert_layers(model)
    config = getattr(model, "config", None)
    pairs = []
    for layer in found:
        state = state_of(layer.module)
        if state is None and getattr(config, CONFIG_KEY, None) is not None:
            state = attach_on_demand(layer.module)
        pairs.append((layer, state or require_state(layer.module, layer.name)))
    return pairs


def _dial(model: nn.Module) -> Dial:
    return _layers(model)[0][1].dial


def full_budget(model: nn.Module) -> int:
    """k * N of an elastic model; raises PrismError for any other."""
    return _dial(model).full_budget


def set_budget(model: nn.Module, k_active: int) -> None:
    """From now on every token may run ``k_active`` sub-experts in a layer.

    Raises:
        PrismError: out of range (1..full budget), or the model is not elastic.
    """
    dial = _dial(model)
    dial.k_active = dial.check(k_active)


@contextmanager
def budget(model: nn.Module, k_active: int) -> Iterator[None]:
    """``set_budget`` for the length of a block."""
    dial = _dial(model)
    before, dial.k_active = dial.k_active, dial.check(k_active)
    try:
        yield
    finally:
        dial.k_active = before


@contextmanager
def routed_experts(model: nn.Module, k: int) -> Iterator[None]:
    """The original model with ``k`` routed experts a token: the baseline at equal compute.

    The family's own router picks and weighs them, so renormalisation and group limits are as they would
    be in a model configured that way. An elastic model runs at full budget meanwhile.

    Raises:
        PrismError: ``k`` is not in 1..top_k.
        UnsupportedModelError: the family's router works for one top_k only.
    """
    layers = find_expert_layers(model)
    top_k = layers[0].top_k
    if not 1 <= k <= top_k:
        raise PrismError(f"k must be from 1 to {top_k}, the model's own, got {k}")
    if k < top_k and type(layers[0].router).__name__ == "PhimoeTopKRouter":
        raise UnsupportedModelError("phimoe's router always picks two experts, so k = 1 cannot be measured")
    states = [s for layer in layers if (s := state_of(layer.module)) is not None]
    before = [s.dial.k_active for s in states]
    try:
        for layer in layers:
            setattr(layer.router, "top_k", k)  # noqa: B010
        for state in states:
            state.dial.k_active = state.dial.full_budget
        yield
    finally:
        for layer in layers:
            setattr(layer.router, "top_k", top_k)  # noqa: B010
        for state, value in zip(states, before, strict=True):
            state.dial.k_active = value


def cost_shares(model: nn.Module, k_active: int) -> CostShares:
    """Routed FLOPs and bytes of a budget, gate included, as shares of the original's.

    Bytes are those of a token that is alone in its step: every weight it uses is read once. At full
    budget the gate does not run.
    """
    layer, state = _layers(model)[0]
    state.dial.check(k_active)
    if k_active == state.dial.full_budget:
        return CostShares(1.0, 1.0)
    shape = LayerShape(layer.num_experts, layer.num_neurons, layer.hidden_size, layer.top_k, state.num_sub_experts)
    neuron = 3 * layer.hidden_size
    full = layer.top_k * layer.num_neurons * neuron
    run = k_active * (layer.num_neurons // state.num_sub_experts) * neuron
    cost = state.gate.cost(shape, k_active)
    return CostShares((2 * run + cost.flops) / (2 * full), (run + cost.weights) / full)

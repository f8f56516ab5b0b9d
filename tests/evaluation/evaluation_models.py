"""Elastic models for the tests of the evaluation room: neurons stay in place, gates are fitted on a few tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_prism import elastic
from moe_prism.checkpoint.schema import Calibration, ElasticConfig, permutation_key
from moe_prism.checkpoint.write import write_checkpoint
from moe_prism.elastic.fingerprint import fingerprint
from moe_prism.experts import down_norms, find_expert_layers
from moe_prism.experts.neurons import activations
from moe_prism.gates import GATES
from moe_prism.gates.base import ExpertProfile


def describe(
    model: PreTrainedModel, ids: torch.Tensor, sub_experts: int, gate: str, seed: int = 0
) -> tuple[ElasticConfig, dict[str, torch.Tensor]]:
    """What a refactoring with the identity permutation and a gate fitted on ``ids`` [n, T] would store."""
    layers = find_expert_layers(model)
    seen: dict[str, tuple[Any, ...]] = {}
    hooks = [
        layer.module.register_forward_pre_hook(lambda _, args, name=layer.name: seen.__setitem__(name, args))
        for layer in layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    method, tensors = GATES.create(gate), {}
    for layer in layers:
        x, index, weights = seen[layer.name]
        norms, fitted = down_norms(layer), []
        for e in range(layer.num_experts):
            token, slot = (index == e).nonzero(as_tuple=True)
            with torch.no_grad():
                profile = ExpertProfile(
                    activations(layer.module, e, x[token]), weights[token, slot], norms[e], layer.router.weight[e]
                )
                fitted.append(method.fit(profile, sub_experts))
        for name in fitted[0]:
            tensors[f"{layer.name}.{name}"] = torch.stack([f[name].detach() for f in fitted]).float()
        tensors[f"{layer.name}.fingerprint"] = fingerprint(layer.module)
        identity = torch.arange(layer.num_neurons, dtype=torch.int32)
        tensors[permutation_key(layer.name)] = identity.expand(layer.num_experts, -1).contiguous()
    first = layers[0]
    config = ElasticConfig(
        num_sub_experts=sub_experts,
        num_experts=first.num_experts,
        num_neurons=first.num_neurons,
        top_k=first.top_k,
        full_budget=first.top_k * sub_experts,
        gate=gate,
        solver="contiguous",
        seed=seed,
        layers=[layer.name for layer in layers],
        calibration=Calibration(text="a few tokens", tokens=ids.numel()),
        weights_dtype=str(model.dtype).removeprefix("torch."),
    )
    return config, tensors


def make_elastic(model: PreTrainedModel, ids: torch.Tensor, sub_experts: int = 4, gate: str = "static") -> None:
    """Attaches a budget dial in place."""
    elastic.attach(model, *describe(model, ids, sub_experts, gate))


def write_elastic(model: PreTrainedModel, tokenizer: Any, ids: torch.Tensor, out: Path, gate: str = "static") -> None:
    """Writes an elastic checkpoint of a stock model."""
    config, tensors = describe(model, ids, 4, gate)

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    write_checkpoint(out, save_model=save, elastic=config, tensors=tensors, recipe_yaml="gate: x\n", card="# test\n")

"""Run one MoE layer at a budget: the function that transformers calls for every stacked experts module.

Scores -> selection -> executor. At full budget the model's own path runs, with no gate work. Knows
nothing of checkpoints: a layer's state is attached by ``elastic.model``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.integrations.moe import grouped_mm_experts_forward

from .._on_import import IMPLEMENTATION
from ..errors import PrismError
from ..experts.neurons import down_bias
from ..gates import Gate
from .dial import Dial
from .executors import run_masked, run_reference
from .selection import choose, gather_selection

# Routed tokens per expert from which small products cost more than the work that they save (measured on a
# CPU at C = 192, H = 192: 0.55 s against 0.21 s for 2,048 tokens at half budget).
MASKED_FROM = 32


@dataclass
class ElasticLayer:
    """What a stacked experts module needs beside its weights.

    Attributes:
        name: module path, for messages.
        dial: shared by all layers of the model.
        gate: scores the sub-experts.
        tensors: the gate's, each ``[E, ...]``.
        num_sub_experts: N.
    """

    name: str
    dial: Dial
    gate: Gate
    tensors: dict[str, Tensor]
    num_sub_experts: int
    _placed: dict[torch.device, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The gate's tensors on a device, moved there once."""
        if device not in self._placed:
            self._placed[device] = {name: value.to(device) for name, value in self.tensors.items()}
        return self._placed[device]


def state_of(module: nn.Module) -> ElasticLayer | None:
    """The state attached to a stacked experts module, if any."""
    return module.__dict__.get("_moe_prism")


def elastic_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The registered experts function.

    Args:
        module: the stacked experts.
        hidden_states: ``[T, H]``.
        top_k_index: int64 ``[T, k]``; the value E marks a slot without an expert on this device.
        top_k_weights: ``[T, k]``.

    Returns:
        ``[T, H]``.
    """
    state = state_of(module)
    if state is None:
        from .model import attach_on_demand

        state = attach_on_demand(module)
    dial = state.dial
    if dial.k_active == dial.full_budget:
        out: Tensor = grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return out
    n, experts = state.num_sub_experts, int(module.num_experts)  # type: ignore[arg-type]
    valid = None
    index = top_k_index
    if module._is_expert_parallel:
        valid = top_k_index < experts
        index = top_k_index.clamp(max=experts - 1)
    scores = state.gate.score(module, state.on(hidden_states.device), hidden_states, index, n)
    budgets = torch.full((len(hidden_states),), dial.k_active, device=hidden_states.device)
    chosen = choose(scores.values, top_k_weights, budgets, state.gate.weighted, valid)
    if len(hidden_states) * index.shape[1] >= MASKED_FROM * experts:
        out = run_masked(module, hidden_states, chosen, index, top_k_weights)
    else:
        selection = gather_selection(chosen, index, top_k_weights)
        out = run_reference(module, hidden_states, selection, n, scores.activations)
    bias = down_bias(module)
    if bias is not None:  # an expert's output bias is kept whatever its sub-experts do: it costs nothing
        weights = top_k_weights if valid is None else top_k_weights.masked_fill(~valid, 0)
        out = out + torch.einsum("tk,tkh->th", weights.float(), bias[index].float()).to(out.dtype)
    return out


def require_state(module: nn.Module, name: str) -> ElasticLayer:
    """The state of a module; raises PrismError if the model is not elastic."""
    state = state_of(module)
    if state is None:
        raise PrismError(
            f"{name} is not elastic; load the model with moe_prism.load_elastic(DIR), or from_pretrained with "
            f'experts_implementation="{IMPLEMENTATION}"'
        )
    return state

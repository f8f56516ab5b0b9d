"""One MoE layer at a budget with gradients, in plain torch: what finetuning runs instead of ``elastic.layer``.

Values are those of the elastic layer. Gradients reach the gate's tensors, neuron scales and compensation, and the
layer's inputs; weights of the model get none. Every routed neuron is computed, so that what a budget skips can say
what it would have been worth. Knows nothing of losses or steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from ..elastic.compensation import Compensation
from ..elastic.executors import NeuronRule
from ..elastic.executors.masked import kept
from ..elastic.layer import ElasticLayer, require_state
from ..elastic.selection import best, first_candidates, pooled_scores, softmax_weights
from ..experts.neurons import activations, down, down_bias, gate_up, num_neurons
from .finetune_masks import straight_through, threshold_between

IMPLEMENTATION = "moe_prism_trainable"
# Natural logarithms of scores: a score within half or twice the threshold's learns most.
TEMPERATURE = 0.5
_TINY = 1e-30


def trainable_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function of a model that is being finetuned; arguments as in ``elastic.layer``."""
    state = require_state(module, "the layer")
    step = state.dial.step(len(hidden_states), hidden_states.device, state.number)
    if step is None:
        own: Tensor = grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return own
    look, count = state.dial.spend(step)
    n = state.num_sub_experts
    scores = state.gate.score(module, state.on(hidden_states.device), hidden_states, top_k_index, n)
    pooled = pooled_scores(scores.values, top_k_weights, state.gate.weighted)
    fixed = pooled.detach()
    chosen = best(fixed, first_candidates(fixed, top_k_weights), look.k_active)
    reweights = state.gate.reweights
    weights = top_k_weights[..., None].float().expand(-1, -1, n)
    if reweights:
        weights = softmax_weights(scores.values, top_k_weights, step.k_active == state.dial.full_budget)
    rows = _Rows(module, hidden_states, top_k_index)
    if count is None:
        coefficient = weights * (chosen if reweights else _chosen(pooled, chosen))
        out = rows.down(rows.by_row(coefficient)[..., None] * rows.activations().unflatten(1, (n, -1)))
    else:
        out = _some_neurons(rows, state, pooled, chosen, weights, count)
    if isinstance(state.compensation, Compensation):
        out = out + state.compensation.of(top_k_index, top_k_weights, step.k_active)
    bias = down_bias(module)
    if bias is not None:
        out = out + torch.einsum("tk,tkh->th", top_k_weights.float(), bias[top_k_index].float())
    return out.to(hidden_states.dtype)


def _chosen(pooled: Tensor, chosen: Tensor) -> Tensor:
    """The choice of sub-experts, ``[T, k, N]``, with gradients for what they were compared by."""
    logs = pooled.clamp(min=_TINY).log().flatten(1)
    return straight_through(logs, chosen.flatten(1), TEMPERATURE).view_as(pooled)


def _some_neurons(
    rows: _Rows, state: ElasticLayer, pooled: Tensor, chosen: Tensor, weights: Tensor, count: Tensor
) -> Tensor:
    assert state.neuron_scale is not None  # attached together with the plan
    tokens, k, n = pooled.shape
    index = rows.index
    hidden = silu(rows.project(slice(None, rows.neurons))).view(tokens, k, n, -1)
    scale = state.neuron_scale.to(index.device)[index].view_as(hidden)
    score = (hidden * weights[..., None]).detach().abs() * scale
    looked_at = chosen[..., None].expand_as(score).reshape(tokens, -1)
    flat = score.flatten(1)
    rule = NeuronRule(state.neuron_scale, count)
    runs = kept(flat.detach().masked_fill(~looked_at, -1.0), rule)
    logs = flat.clamp(min=_TINY).log().masked_fill(~looked_at, -torch.inf)
    threshold = threshold_between(logs.detach(), runs)
    # What was not looked at would run where its score passes: only the choice of sub-experts learns from it.
    would = torch.where(looked_at, straight_through(logs, runs, TEMPERATURE), (flat.detach().log() > threshold).float())
    mask = would.view_as(score) * _chosen(pooled, chosen)[..., None]
    up = rows.project(slice(rows.neurons, None)).view_as(hidden)
    return rows.down((hidden * up * weights[..., None] * mask).view(tokens * k, -1)[rows.order])


class _Rows:
    """Every routed expert of every token: products of those of an expert together, results by token.

    Attributes:
        index: int64 ``[T, k]``.
        neurons: C.
        order: int64 ``[T k]``, the (token, slot) pairs, those of an expert together.
    """

    def __init__(self, module: nn.Module, x: Tensor, index: Tensor) -> None:
        self.module, self.index, self.neurons = module, index, num_neurons(module)
        expert, self.order = index.flatten().sort(stable=True)
        self._place = self.order.argsort()
        self._counts = torch.bincount(expert, minlength=int(module.num_experts)).tolist()  # type: ignore[arg-type]
        # Split, not sliced: the gradient of a slice is as large as the whole.
        self._x = x[self.order // index.shape[1]].split(self._counts)

    def project(self, neurons: slice) -> Tensor:
        """Products with a run of the gate and up rows: ``[T k, c]`` in the order of tokens."""
        parts = [linear(x, gate_up(self.module, e, slice(None))[neurons]) for e, x in enumerate(self._x)]
        return torch.cat(parts).float()[self._place]

    def activations(self) -> Tensor:
        """``[T k, C]``, by expert."""
        return torch.cat([activations(self.module, e, x) for e, x in enumerate(self._x)]).float()

    def by_row(self, coefficient: Tensor) -> Tensor:
        """``[T, k, N]`` as ``[T k, N]``, by expert."""
        return coefficient.flatten(0, 1)[self.order]

    def down(self, hidden: Tensor) -> Tensor:
        """Sum over a token's experts of ``hidden``, by expert, times the down rows: fp32 ``[T, H]``."""
        flat = hidden.reshape(len(self.order), -1).to(self._x[0].dtype).split(self._counts)
        parts = [(rows @ down(self.module, e, slice(None))).float() for e, rows in enumerate(flat)]
        return torch.cat(parts)[self._place].view(*self.index.shape, -1).sum(dim=1)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, trainable_experts)

"""What a budget costs, in work of the routed experts. Knows nothing of time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..experts import ExpertLayer
from ..gates import LayerShape
from .budgets import elastic_layers
from .layer import ElasticLayer


class CostShares(NamedTuple):
    """Work of a budget, gate included, over the routed-expert work of the original model."""

    flops: float
    bytes: float


def cost_shares(model: nn.Module, k_active: int) -> CostShares:
    """Routed FLOPs and bytes of a budget, gate included, as shares of the original's.

    Bytes are those of a token that is alone in its step: every weight it uses is read once. They differ from FLOPs
    where a shadow of fewer bits is read (``elastic.ladder``). At full budget the gate does not run.
    """
    layers = elastic_layers(model)
    layers[0][1].dial.check(k_active)
    costs = [_cost_of(layer, state, k_active) for layer, state in layers]
    return CostShares(*(sum(shares) / len(costs) for shares in zip(*costs, strict=True)))


def budget_within(model: nn.Module, share: float, axes: Sequence[str] = CostShares._fields) -> int | None:
    """The largest budget that stays within a share, to half a percent; None if no budget does.

    Args:
        model: elastic.
        share: of the original's routed work.
        axes: "flops", "bytes", or both.
    """
    budgets = range(1, elastic_layers(model)[0][1].dial.full_budget + 1)
    costs = ((k, cost_shares(model, k)) for k in budgets)
    return max((k for k, cost in costs if max(getattr(cost, axis) for axis in axes) <= share + 0.005), default=None)


def _cost_of(layer: ExpertLayer, state: ElasticLayer, budget: int) -> CostShares:
    k_active = int(state.dial.of_layer(torch.tensor(budget), state.number))
    if k_active == state.dial.full_budget:
        return CostShares(1.0, 1.0)
    shape = LayerShape(layer.num_experts, layer.num_neurons, layer.hidden_size, layer.top_k, state.num_sub_experts)
    size = layer.num_neurons // state.num_sub_experts
    full = layer.top_k * layer.num_neurons * 3 * layer.hidden_size
    products = read = 3.0 * k_active * size
    scan = k_active
    plan = state.dial.plan
    if plan is not None:
        scan, products, read = int(plan.scan[k_active]), plan.products(k_active), plan.rows_read(k_active)
    costs = [state.gate.cost(shape, scan)]
    if state.compensation is not None:
        costs.append(state.compensation.cost(shape))
    flops, weights = sum(cost.flops for cost in costs), sum(cost.weights for cost in costs)
    hidden = layer.hidden_size
    return CostShares((2 * products * hidden + flops) / (2 * full), (read * hidden + weights) / full)

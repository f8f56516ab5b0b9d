"""Neuron activation profiles of experts (arXiv 2510.19366, phase 1.1).

From what a layer received, the activation matrix of each expert over (a uniform sample of) the tokens
routed to it. One expert's matrix is in memory at a time and worker. Knows nothing of partitions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import PrismError
from ..experts import ExpertLayer
from ..experts.neurons import activations, gate_up, is_plain
from .capture import LayerInput


class Profile(NamedTuple):
    """The profile of one expert, neurons in stored order.

    Attributes:
        activations: fp32 ``[B, C]``.
        mean_up: fp32 ``[C]``, mean |x W_up|; None where the layer is not ``silu(gate) * up``.
        routing_weights: fp32 ``[B]``.
        routed_tokens: calibration tokens that the router sent here, before sampling.
        is_fallback: too few were; the profile is of a sample of all tokens, with weight 1.
    """

    activations: Tensor
    mean_up: Tensor | None
    routing_weights: Tensor
    routed_tokens: int
    is_fallback: bool


def sample(count: int, limit: int, seed: tuple[int, ...]) -> Tensor:
    """At most ``limit`` of ``count`` positions, uniformly, ascending: int64.

    Every position draws a priority from the seed and the smallest win, which is reservoir sampling whose
    outcome does not depend on how the stream was cut into batches.
    """
    if count <= limit:
        return torch.arange(count)
    priority = np.random.default_rng(seed).random(count)
    return torch.from_numpy(np.sort(np.argpartition(priority, limit)[:limit]))


@torch.no_grad()
def profile_expert(
    layer: ExpertLayer, received: LayerInput, expert: int, limit: int, minimum: int, seed: tuple[int, ...]
) -> Profile:
    """Activations of one expert.

    Args:
        layer: where the weights are.
        received: what the layer received.
        expert: which expert.
        limit: tokens kept at most.
        minimum: with fewer routed tokens than this, a sample of all tokens stands in.
        seed: of the sample.

    Raises:
        PrismError: an activation is not finite; the message names the layer and the expert.
    """
    token, slot = (received.experts == expert).nonzero(as_tuple=True)
    routed = len(token)
    fallback = routed < minimum
    if fallback:
        token = sample(len(received.x), limit, seed)
        weight = torch.ones(len(token))
    else:
        kept = sample(routed, limit, seed)
        token, slot = token[kept], slot[kept]
        weight = received.weight[token, slot]
    weights: Tensor = layer.module.down_proj  # type: ignore[assignment]
    x = received.x[token].to(weights.device)
    matrix = activations(layer.module, expert, x.to(weights.dtype)).float().cpu()
    if not torch.isfinite(matrix).all():
        raise PrismError(
            f"{layer.name}, expert {expert}: activations are not finite (NaN or infinite); "
            "load the model in a wider dtype (--dtype float32) or check its weights"
        )
    mean_up = None
    if is_plain(layer.module):
        rows = gate_up(layer.module, expert, slice(None))[layer.num_neurons :]
        mean_up = torch.nn.functional.linear(x.to(weights.dtype), rows).float().abs().mean(dim=0).cpu()
    return Profile(matrix, mean_up, weight, routed, fallback)

"""Reorder the neurons of every expert in place; the function of the model does not change.

A permutation is an int64 tensor ``[E, C]``: new position j of expert e holds the neuron that was at
``permutation[e, j]``. Knows nothing of why an order was chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PrismError
from .layers import ExpertLayer


def invert_permutation(permutation: Tensor) -> Tensor:
    """The permutation that undoes ``permutation`` (``[E, C]``, any integer dtype)."""
    return torch.argsort(permutation.long(), dim=1)


@torch.no_grad()
def permute_neurons(layer: ExpertLayer, permutation: Tensor) -> None:
    """Reorder gate, up (with their biases) and down of every expert of ``layer`` in place.

    Extra memory is one expert's weights.

    Raises:
        PrismError: ``permutation`` is not an ``[E, C]`` table of permutations; nothing was changed.
    """
    shape = (layer.num_experts, layer.num_neurons)
    order = permutation.long().cpu()
    if tuple(order.shape) != shape:
        raise PrismError(f"{layer.name}: permutation has shape {tuple(order.shape)}, needed is {shape}")
    if not torch.equal(order.sort(dim=1).values, torch.arange(shape[1]).expand(shape)):
        raise PrismError(f"{layer.name}: every row of the permutation must hold 0..{shape[1] - 1} once")
    module = layer.module
    for e in range(layer.num_experts):
        neuron = order[e].to(module.down_proj.device)  # type: ignore[arg-type]
        if module.is_concatenated:
            pair = torch.cat([neuron, neuron + shape[1]])
        else:
            pair = torch.stack([2 * neuron, 2 * neuron + 1], dim=1).flatten()
        _reorder(module.gate_up_proj, e, pair, 1 if module.is_transposed else 0)
        _reorder(module.down_proj, e, neuron, 0 if module.is_transposed else 1)
        if module.has_bias:
            _reorder(module.gate_up_proj_bias, e, pair, 0)


@torch.no_grad()
def down_norms(layer: ExpertLayer) -> Tensor:
    """Euclidean norm of every neuron's down weights: fp32 ``[E, C]``."""
    weight: Tensor = layer.module.down_proj  # type: ignore[assignment]
    dim = 2 if layer.module.is_transposed else 1
    return torch.stack([row.float().norm(dim=dim - 1) for row in weight])


def _reorder(weight: object, expert: int, order: Tensor, dim: int) -> None:
    row = weight.data[expert]  # type: ignore[attr-defined]
    row.copy_(row.index_select(dim, order))

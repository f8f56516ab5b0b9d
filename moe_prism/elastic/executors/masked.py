"""Many tokens at once: whole experts, with the activations of unselected sub-experts set to zero.

It does the work of full budget at every budget, in one pair of large products per expert, so it is for
measuring quality on long texts and for prefill on few cores, not for saving time at a token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...experts.neurons import activations, down, num_neurons
from ...gates.base import rows_of


def run_masked(module: nn.Module, x: Tensor, chosen: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The same sum as ``run_reference`` gives for the same choice.

    Args:
        module: stacked experts with permuted neurons.
        x: ``[T, H]``.
        chosen: bool ``[T, k, N]``.
        index: int64 ``[T, k]``.
        weights: ``[T, k]``.

    Returns:
        ``[T, H]`` in the dtype of ``x``; sums are kept in fp32.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    size = num_neurons(module) // chosen.shape[2]
    needed = torch.where(chosen.any(dim=2), index, int(module.num_experts))  # type: ignore[arg-type]
    for expert, token, slot in rows_of(needed, int(module.num_experts)):  # type: ignore[arg-type]
        if expert == int(module.num_experts):  # type: ignore[arg-type]
            break
        hidden = activations(module, expert, x[token])
        hidden = hidden.unflatten(1, (-1, size)) * chosen[token, slot, :, None]
        product = hidden.flatten(1) @ down(module, expert, slice(None))
        out.index_add_(0, token, product.float() * weights[token, slot, None].float())
    return out.to(x.dtype)

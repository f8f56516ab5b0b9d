"""Many tokens at once: whole experts, with the activations of unselected sub-experts set to zero.

It does the work of full budget at every budget, in one pair of large products per expert, so it is for
measuring quality on long texts and for prefill on few cores, not for saving time at a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...experts.neurons import activations, down, num_neurons
from ..selection import Selection
from .base import EXECUTORS, Executor, num_experts


@EXECUTORS.register("masked")
@dataclass(frozen=True)
class MaskedExecutor(Executor):
    """A loop over whole experts."""

    def refusal(self, module: nn.Module, x: Tensor) -> str | None:
        """Runs everything."""
        return None

    def run(self, module: nn.Module, x: Tensor, selection: Selection, n: int, computed: Tensor | None = None) -> Tensor:
        """See ``Executor.run``; what a gate computed is computed again, inside the large products."""
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        size = num_neurons(module) // n
        experts = selection.sub_expert // n
        start = 0
        for expert, count in enumerate(torch.bincount(experts, minlength=num_experts(module)).tolist()):
            if not count:
                continue
            rows = slice(start, start + count)
            token, row = torch.unique(selection.token[rows], return_inverse=True)
            mask = torch.zeros(len(token), n, dtype=x.dtype, device=x.device)
            mask[row, selection.sub_expert[rows] - expert * n] = selection.weight[rows].to(x.dtype)
            hidden = activations(module, expert, x[token]).unflatten(1, (n, size)) * mask[..., None]
            out.index_add_(0, token, (hidden.flatten(1) @ down(module, expert, slice(None))).float())
            start += count
        return out.to(x.dtype)

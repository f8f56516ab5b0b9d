"""The plain executor: one pair of matrix products per sub-expert, in any layout and dtype.

It is exact in fp32 and is the oracle for faster ones. It reads the model's own tensors, so sub-experts
need no second copy. The work is proportional to the selection, but small products are not fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...experts.neurons import activations, down, num_neurons
from ..selection import Selection
from .base import EXECUTORS, Executor, num_experts


@EXECUTORS.register("reference")
@dataclass(frozen=True)
class ReferenceExecutor(Executor):
    """A loop over the selected sub-experts."""

    def refusal(self, module: nn.Module, x: Tensor) -> str | None:
        """Runs everything."""
        return None

    def run(self, module: nn.Module, x: Tensor, selection: Selection, n: int, computed: Tensor | None = None) -> Tensor:
        """See ``Executor.run``."""
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        size = num_neurons(module) // n
        r = 0 if computed is None else computed.shape[3]
        counts = torch.bincount(selection.sub_expert, minlength=num_experts(module) * n).tolist()
        start = 0
        for sub_expert, count in enumerate(counts):
            if not count:
                continue
            expert, part = divmod(sub_expert, n)
            rows = slice(start, start + count)
            token = selection.token[rows]
            run = slice(part * size, (part + 1) * size)
            hidden = activations(module, expert, x[token], slice(run.start + r, run.stop))
            if computed is not None:
                hidden = torch.cat([computed[token, selection.slot[rows], part].to(hidden.dtype), hidden], dim=1)
            product = hidden @ down(module, expert, run)
            out.index_add_(0, token, product.float() * selection.weight[rows, None].float())
            start += count
        return out.to(x.dtype)

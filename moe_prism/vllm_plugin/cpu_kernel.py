"""An executor on vLLM's fused kernel for CPUs: every sub-expert is an expert of C / N neurons.

The kernel takes the same number of experts for all tokens of a call, and an id that means "none" would write out of
bounds there. So tokens are grouped by how many sub-experts they run, one call for each group: nothing that is not
selected is read or computed, and a token's sums are those that it gets alone. Knows nothing of layers or of steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor, nn
from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

from ..elastic.executors.base import EXECUTORS, Executor
from ..elastic.selection import Selection

NAME = "vllm-cpu"
_MULTIPLE = 32  # of a sub-expert's neurons, for the kernel's vectors
_WASTE = 1.5  # how much larger than its neurons a padded sub-expert may be


class VirtualExperts(NamedTuple):
    """One layer's sub-experts in the kernel's own layout.

    Attributes:
        gate_up: ``[E * N, 2c, H]``, packed; c is C / N rounded up to a multiple of 32.
        down: ``[E * N, H, c]``, packed.
        isa: name of the kernel's variant.
    """

    gate_up: Tensor
    down: Tensor
    isa: str

    @classmethod
    def of(cls, gate_up: Tensor, down: Tensor, n: int, isa: str) -> VirtualExperts:
        """From ``[E, 2C, H]`` and ``[E, H, C]``."""
        experts, hidden, neurons = down.shape
        size = neurons // n
        pad = -size % _MULTIPLE
        rows = gate_up.view(experts, 2, n, size, hidden).transpose(1, 2).flatten(0, 1)
        rows = nn.functional.pad(rows, (0, 0, 0, pad)).reshape(experts * n, 2 * (size + pad), hidden)
        columns = down.view(experts, hidden, n, size).transpose(1, 2).flatten(0, 1)
        columns = nn.functional.pad(columns, (0, pad)).contiguous()
        return cls(cpu_prepack_moe_weight(rows, isa), cpu_prepack_moe_weight(columns, isa), isa)

    def run(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """``[T, H]`` of ``[T, H]``, fp32 weights and int32 ids ``[T, m]``, all contiguous."""
        out = torch.empty_like(x)
        cpu_fused_moe(out, x, self.gate_up, self.down, None, None, weights, ids, "silu", self.isa)
        return out


def fits(neurons: int, n: int) -> bool:
    """Whether sub-experts fill the kernel's vectors well enough."""
    size = neurons // n
    return size + -size % _MULTIPLE <= _WASTE * size


def all_sub_experts(weights: Tensor, ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Full budget: weights fp32 and ids int32 ``[T, k * N]`` of the router's ``[T, k]``."""
    every = ids.int()[..., None] * n + torch.arange(n, dtype=torch.int32)
    return weights.float().repeat_interleave(n, dim=1), every.flatten(1)


@EXECUTORS.register(NAME)
@dataclass(frozen=True)
class VllmCpuExecutor(Executor):
    """For modules with an attribute ``virtual``; its layout is not that of ``packed_rows``."""

    def refusal(self, module: nn.Module, x: Tensor) -> str | None:
        """Needs weights in the kernel's layout."""
        return None if getattr(module, "virtual", None) is not None else "its weights are not packed for vLLM's kernel"

    def run(self, module: nn.Module, x: Tensor, selection: Selection, n: int, computed: Tensor | None = None) -> Tensor:
        """See ``Executor.run``; what a gate computed is computed again."""
        virtual: VirtualExperts = module.virtual  # type: ignore[assignment]
        rows, ids, weights, bounds = by_count(
            selection.token.numpy(), selection.sub_expert.numpy(), selection.weight.float().numpy(), len(x)
        )
        if len(bounds) == 1 and bounds[0][1]:
            shape = (len(x), bounds[0][1])
            return virtual.run(x, torch.from_numpy(weights).view(shape), torch.from_numpy(ids).view(shape))
        out = torch.zeros_like(x)
        pair = row = 0
        for tokens, count in bounds:
            mine, pairs = torch.from_numpy(rows[row : row + tokens]), slice(pair, pair + tokens * count)
            row, pair, shape = row + tokens, pairs.stop, (tokens, count)
            if count:
                out[mine] = virtual.run(
                    x[mine], torch.from_numpy(weights[pairs]).view(shape), torch.from_numpy(ids[pairs]).view(shape)
                )
        return out


def by_count(token: Any, sub_expert: Any, weight: Any, tokens: int) -> tuple[Any, Any, Any, list[tuple[int, int]]]:
    """Sort pairs by how many their token has, then by token.

    Args:
        token: int64 ``[S]``.
        sub_expert: int64 ``[S]``.
        weight: fp32 ``[S]``.
        tokens: T.

    Returns:
        Tokens in their new order, int64 ``[T]``; ids int32 ``[S]`` and weights ``[S]`` in that order; and for every
        count that occurs, ascending, (tokens, count).
    """
    rows, ids, weights, counts = _by_count(token, sub_expert, weight, tokens)
    values, each = np.unique(counts, return_counts=True)
    return rows, ids, weights, list(zip(each.tolist(), values.tolist(), strict=True))


@numba.njit(cache=True, nogil=True)
def _by_count(token: Any, sub_expert: Any, weight: Any, tokens: int) -> Any:
    counts = np.zeros(tokens, np.int64)
    for t in token:
        counts[t] += 1
    rows = np.argsort(counts, kind="mergesort")
    place = np.empty(tokens, np.int64)
    begin = 0
    for t in rows:
        place[t] = begin
        begin += counts[t]
    ids = np.empty(len(token), np.int32)
    weights = np.empty(len(token), np.float32)
    for i in range(len(token)):
        at = place[token[i]]
        ids[at] = sub_expert[i]
        weights[at] = weight[i]
        place[token[i]] += 1
    return rows, ids, weights, counts[rows]

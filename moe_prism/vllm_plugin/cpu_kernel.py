"""An executor on vLLM's fused kernel for CPUs: every sub-expert is an expert of C / N neurons.

The kernel takes the same number of experts for all tokens of a call, and an id that means "none" would write out of
bounds there. So tokens that run fewer than others of their call name their last sub-expert again, with a weight of
zero: nothing that is not selected is read, and a token's sums are those that it gets alone. Calls cost more than
products that count for nothing (docs/results/vllm_kernel.json), so tokens part only where most products would. Knows
nothing of layers or of steps.
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
PADDED = 2.0  # products of a call over those that count, at most


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
        pairs = selection.token.numpy(), selection.sub_expert.numpy(), selection.weight.float().numpy()
        calls = padded_calls(*pairs, len(x), PADDED)
        if len(calls) == 1 and len(calls[0].rows) == len(x):
            return virtual.run(x, *_in_order(calls[0]))
        out = torch.zeros_like(x)
        for call in calls:
            mine = torch.from_numpy(call.rows)
            out[mine] = virtual.run(x[mine], torch.from_numpy(call.weights), torch.from_numpy(call.ids))
        return out


class Call(NamedTuple):
    """Tokens that run together.

    Attributes:
        rows: int64 ``[t]``, which.
        ids: int32 ``[t, m]``, their sub-experts; what a token has fewer of repeats its last one.
        weights: fp32 ``[t, m]``, 0 for what is repeated.
    """

    rows: Any
    ids: Any
    weights: Any


def _in_order(call: Call) -> tuple[Tensor, Tensor]:
    """Weights and ids of all tokens of a step, in their own order."""
    order = np.argsort(call.rows)
    return torch.from_numpy(call.weights[order]), torch.from_numpy(call.ids[order])


def padded_calls(token: Any, sub_expert: Any, weight: Any, tokens: int, most: float) -> list[Call]:
    """Part the tokens of a step into calls.

    Args:
        token: int64 ``[S]`` of (token, sub-expert) pairs, in any order.
        sub_expert: int64 ``[S]``.
        weight: fp32 ``[S]``.
        tokens: T; those without a pair are in no call.
        most: ids of a call over its pairs, at most, as long as tokens differ.

    Returns:
        Calls, those of the most pairs a token first.
    """
    rows, ids, weights, counts = _by_count(token, sub_expert, weight, tokens)
    ends = np.cumsum(counts)
    calls, last = [], tokens
    while last and counts[last - 1]:
        width = int(counts[last - 1])
        # Tokens are in the order of their counts: the more of them, the more is padded.
        shares = width * np.arange(1, last + 1) / np.maximum(1, np.cumsum(counts[:last][::-1]))
        fits = (shares <= most) & (counts[:last][::-1] > 0)
        count = max(int((counts[:last] == width).sum()), int(np.flatnonzero(fits)[-1]) + 1)
        first = last - count
        begin = int(ends[first] - counts[first])
        mine = slice(begin, int(ends[last - 1]))
        calls.append(Call(rows[first:last], *_padded(ids[mine], weights[mine], counts[first:last], width)))
        last = first
    return calls


@numba.njit(cache=True, nogil=True)
def _padded(ids: Any, weights: Any, counts: Any, width: int) -> Any:
    every = np.empty((len(counts), width), np.int32)
    values = np.zeros((len(counts), width), np.float32)
    pair = 0
    for t in range(len(counts)):
        for m in range(width):
            if m < counts[t]:
                every[t, m], values[t, m] = ids[pair], weights[pair]
                pair += 1
            else:
                every[t, m] = ids[pair - 1]
    return every, values


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

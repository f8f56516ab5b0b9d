"""Many tokens at once: whole experts, with the activations of unselected sub-experts set to zero.

It does the work of full budget at every budget, in one pair of large products per expert, so it is for
measuring quality on long texts and for prefill on few cores, not for saving time at a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...experts.neurons import activations, down, gate_up, num_neurons
from ..selection import Selection
from .base import EXECUTORS, Executor, NeuronRule, num_experts

# Tokens whose activations are in memory at once when neurons are skipped: 64 MB for OLMoE-1B-7B.
_CHUNK = 2048


@EXECUTORS.register("masked")
@dataclass(frozen=True)
class MaskedExecutor(Executor):
    """A loop over whole experts."""

    skips_neurons: ClassVar[bool] = True

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

    def run_some(self, module: nn.Module, x: Tensor, selection: Selection, n: int, rule: NeuronRule) -> Tensor:
        """See ``Executor.run_some``; gates first, then up and down of whole experts with the rest set to zero."""
        out = torch.empty_like(x)
        for begin in range(0, len(x), _CHUNK):
            part = slice(begin, begin + _CHUNK)
            mine = (selection.token >= begin) & (selection.token < begin + _CHUNK)
            chosen = Selection(*(values[mine] for values in selection))
            chosen = chosen._replace(token=chosen.token - begin)
            counts = None if rule.count is None else rule.count.to(x.device)[part]
            out[part] = _some_of(module, x[part], chosen, n, replace(rule, count=counts))
        return out


def _some_of(module: nn.Module, x: Tensor, selection: Selection, n: int, rule: NeuronRule) -> Tensor:
    neurons = num_neurons(module)
    rule.check(neurons // n)
    if not len(selection.token):
        return torch.zeros_like(x)
    token, slot, part = selection.token, selection.slot, selection.sub_expert % n
    slots = int(slot.max()) + 1
    weight = torch.zeros(len(x), slots, n, device=x.device)
    weight[token, slot, part] = selection.weight.float()
    looked_at = torch.zeros(len(x), slots, n, dtype=torch.bool, device=x.device)
    looked_at[token, slot, part] = True
    routed = torch.full((len(x), slots), -1, device=x.device)
    routed[token, slot] = selection.sub_expert // n
    # One row a routed expert of a token, those of an expert together, so that all products are of slices.
    expert, order = routed.flatten().sort(stable=True)
    order = order[expert >= 0]
    runs = torch.bincount(expert[expert >= 0], minlength=num_experts(module)).tolist()
    rows = x[order // slots]
    hidden = torch.empty(len(order), neurons, device=x.device)
    for e, run in runs_of(runs):
        hidden[run] = torch.nn.functional.linear(rows[run], gate_up(module, e, slice(None))[:neurons]).float()
    hidden = torch.nn.functional.silu(hidden).view(-1, n, neurons // n) * weight.view(-1, n, 1)[order]
    score = hidden.abs() * rule.scale.to(x.device)[routed.flatten()[order]].view_as(hidden)
    score = score.nan_to_num_(torch.inf, torch.inf).masked_fill_(~looked_at.view(-1, n, 1)[order], -1.0)
    by_token = torch.full((len(x) * slots, neurons), -1.0, device=x.device)
    by_token[order] = score.flatten(1)
    hidden = hidden.flatten(1) * kept(by_token.view(len(x), -1), rule).view(-1, neurons)[order]
    result = torch.zeros(len(x) * slots, x.shape[1], device=x.device)
    for e, run in runs_of(runs):
        up = torch.nn.functional.linear(rows[run], gate_up(module, e, slice(None))[neurons:])
        product = (hidden[run] * up.float()).to(x.dtype) @ down(module, e, slice(None))
        result[order[run]] = product.float()
    return result.view(len(x), slots, -1).sum(dim=1).to(x.dtype)


def runs_of(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of every expert that has any."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def kept(score: Tensor, rule: NeuronRule) -> Tensor:
    """The neurons that run, bool ``[T, S]``; a score of -1 is of a neuron that cannot, with its whole block."""
    by_block = rule.of_blocks(score)
    blocks = rule.blocks
    if blocks is None:
        return rule.of_neurons(by_block > rule.threshold)  # type: ignore[operator]
    return rule.of_neurons(best_neurons(by_block, blocks))


def best_neurons(score: Tensor, count: Tensor) -> Tensor:
    """The ``count[t]`` largest of every row, bool ``[T, S]``."""
    most = min(int(count.max()), score.shape[1])
    best = score.topk(most, dim=1, sorted=bool((count < most).any())).indices
    within = torch.arange(most, device=score.device) < count[:, None]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, within)

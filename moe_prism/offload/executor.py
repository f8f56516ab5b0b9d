"""Run sub-experts from a block file: those in memory while the others are being read.

The outputs of a layer are added up in the order of sub-experts, whichever came first, so that results do not depend
on what was cached. Knows nothing of scores: it is given a selection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..elastic.executors import EXECUTORS, Executor, NeuronRule
from ..elastic.selection import Selection
from ..experts.neurons import is_plain
from .parts import LayerBlocks, blocks_of, by_sub_expert, parts_of
from .plain import run_plain

NAME = "offload"


@EXECUTORS.register(NAME)
@dataclass(frozen=True)
class OffloadExecutor(Executor):
    """Reads what is not in memory; arithmetic in fp32 by the CPU kernels, or on a device by its matrix products."""

    skips_neurons: ClassVar[bool] = True
    runs_full: ClassVar[bool] = True

    def refusal(self, module: nn.Module, x: Tensor) -> str | None:
        """Needs a model that ``load_offloaded`` made, and inputs where its fast tier is."""
        blocks = blocks_of(module)
        if blocks is None:
            return "its weights are not in a block file; load a packed checkpoint with moe_prism.offload.load_offloaded"
        device = blocks.manager.tier.device
        return None if x.device == device else f"the input is on {x.device}, the blocks are on {device}"

    def run(self, module: nn.Module, x: Tensor, selection: Selection, n: int, computed: Tensor | None = None) -> Tensor:
        """See ``Executor.run``; ``computed`` is None, since no gate of an offloaded model reads neurons."""
        blocks = _required(module)
        if blocks.manager.tier.arrays and is_plain(module):
            return run_plain(blocks, x, by_sub_expert(selection, n, blocks.num_sub_experts))
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        selection = Selection(*(values.cpu() for values in selection))  # which block is where is the host's business
        for part in parts_of(by_sub_expert(selection, n, blocks.num_sub_experts), blocks, x.shape[1]):
            outputs = torch.empty(len(part.pairs.token), x.shape[1], device=x.device)
            for ready in part.as_they_come(x):
                projected = ready.project(module, x)
                hidden: Tensor = module._apply_gate(projected)  # type: ignore[operator]
                weight = ready.pairs.weight[:, None].float().to(x.device)
                outputs[ready.at.to(x.device)] = ready.down(hidden * weight)
            _add_up(out, part.pairs.token.to(x.device), outputs)
        return out.to(x.dtype)

    def run_some(self, module: nn.Module, x: Tensor, selection: Selection, n: int, rule: NeuronRule) -> Tensor:
        """See ``Executor.run_some``; whole blocks are read, so this saves arithmetic and no bytes.

        Every block is needed twice, before and after the choice; the second time it is in memory if all of them fit.
        """
        blocks = _required(module)
        selection = Selection(*(values.cpu() for values in selection))
        size = blocks.manager.layout.neurons
        rule.check(size)
        hidden, score = torch.empty(2, len(selection.token), size)
        scale = rule.scale.view(-1, size).cpu()
        parts = list(parts_of(selection, blocks, x.shape[1]))
        for part in parts:
            for ready in part.as_they_come(x):
                gate, up = ready.project(module, x).cpu().chunk(2, dim=1)
                gate = torch.nn.functional.silu(gate) * ready.pairs.weight[:, None].float()
                at = ready.at + part.begin
                hidden[at], score[at] = gate * up, gate.abs() * scale[ready.pairs.sub_expert]
        hidden *= _kept(selection.token, score, rule)
        hidden, out = hidden.to(x.device), torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for part in parts:
            outputs = torch.empty(len(part.pairs.token), x.shape[1], device=x.device)
            for ready in part.as_they_come(None):
                outputs[ready.at.to(x.device)] = ready.down(hidden[(ready.at + part.begin).to(x.device)])
            _add_up(out, part.pairs.token.to(x.device), outputs)
        return out.to(x.dtype)


def _add_up(out: Tensor, token: Tensor, outputs: Tensor) -> None:
    """Add outputs to their tokens' rows, always in the same order."""
    if out.device.type == "cpu":
        out.index_add_(0, token, outputs)
    else:  # where index_add_ adds in the order in which threads come, and this sorts first
        out.index_put_((token,), outputs, accumulate=True)


def _kept(token: Tensor, score: Tensor, rule: NeuronRule) -> Tensor:
    """The neurons that run, bool ``[S, c]``: a token's best over all of its pairs."""
    score, count = rule.of_blocks(score), rule.blocks
    if count is None:
        return rule.of_neurons(score > rule.threshold)  # type: ignore[operator]
    flat = score.nan_to_num(torch.inf, torch.inf).flatten().numpy()
    owner = token.repeat_interleave(score.shape[1]).numpy()
    order = np.lexsort((-flat, owner))
    begins = np.searchsorted(owner[order], np.arange(len(count)))
    rank = np.empty(len(flat), np.int64)
    rank[order] = np.arange(len(flat)) - begins[owner[order]]
    return rule.of_neurons(torch.from_numpy(rank < count.numpy()[owner]).view_as(score))


def _required(module: nn.Module) -> LayerBlocks:
    blocks = blocks_of(module)
    assert blocks is not None  # refusal was asked
    return blocks

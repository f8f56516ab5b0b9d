"""Skip neurons inside the selected sub-experts, on a CPU with few tokens.

The gate rows are computed for all neurons; a neuron whose score is too small costs nothing more, since its
up and down weights are rows of their own, and a skipped row is skipped bytes. Knows nothing of where the
scales come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import PrismError
from ...experts.packing import packed_rows
from ..kernels import add_some_rows, multiply_rows, multiply_some_rows
from ..selection import Selection
from .base import is_plain
from .cpu import CpuExecutor, Groups, as_rows


@dataclass(frozen=True)
class NeuronRule:
    """Which neurons of its selected sub-experts a token runs, by ``weight * |silu(gate)| * scale``.

    Attributes:
        scale: fp32 ``[E, C]``, how much a neuron matters per unit of its gate activation: for example mean
            |up| times the norm of its down row.
        count: the ``count`` best neurons of every token, over all its sub-experts; or None.
        threshold: neurons whose score exceeds it; or None. Exactly one of the two is given.
    """

    scale: Tensor
    count: int | None = None
    threshold: float | None = None


def refusal(module: nn.Module, x: Tensor) -> str | None:
    """Why a layer cannot skip neurons; None if it can."""
    if not is_plain(module):
        return "it is not silu(gate) * up without biases"
    return CpuExecutor().refusal(module, x)


def run_some_neurons(module: nn.Module, x: Tensor, selection: Selection, n: int, rule: NeuronRule) -> Tensor:
    """Weighted sum of the neurons that the rule keeps.

    Args:
        module: packed stacked experts.
        x: ``[T, H]``.
        selection: sub-experts to look at.
        n: sub-experts of one expert.
        rule: which of their neurons run.

    Returns:
        ``[T, H]`` in the dtype of ``x``; sums are kept in fp32.

    Raises:
        PrismError: the layer cannot do it, or the rule is not one rule.
    """
    if (rule.count is None) == (rule.threshold is None):
        raise PrismError(f"give count or threshold, got count={rule.count}, threshold={rule.threshold}")
    reason = refusal(module, x)
    rows = packed_rows(module)
    if reason is not None or rows is None:
        raise PrismError(f"neurons of this layer cannot be skipped: {reason}")
    neurons = rows.down.shape[1]
    size = neurons // n
    groups = Groups.of(selection, n)
    tokens = x.float().contiguous().numpy()
    gate_up = as_rows(rows.gate_up)
    gate = torch.empty(len(selection.token), size)
    first = groups.expert * 2 * neurons + groups.part * size
    multiply_rows(gate_up, tokens, groups.token, groups.starts, first, 1, 0, size, gate.numpy())
    active = torch.nn.functional.silu(gate) * selection.weight[:, None].float()
    scale = rule.scale.view(-1, size)[selection.sub_expert]
    pair, inside = _kept(active.abs() * scale, selection.token, rule)
    token = selection.token[pair]
    sub_expert = selection.sub_expert[pair]
    down_row = sub_expert * size + inside
    up_row = down_row + (sub_expert // n + 1) * neurons  # every expert before has C rows of gate and C of up
    up = torch.empty(len(pair))
    multiply_some_rows(gate_up, tokens, up_row.numpy(), token.numpy(), up.numpy())
    hidden = up * active[pair, inside]
    out = torch.zeros(x.shape, dtype=torch.float32)
    add_some_rows(as_rows(rows.down), hidden.numpy(), down_row.numpy(), token.numpy(), out.numpy())
    return out.to(x.dtype)


def _kept(score: Tensor, token: Tensor, rule: NeuronRule) -> tuple[Tensor, Tensor]:
    """(pair, neuron inside its sub-expert) of the kept neurons, those of a token together, in row order."""
    if rule.threshold is not None:
        keep = score > rule.threshold
    else:
        keep = torch.zeros_like(score, dtype=torch.bool)
        for one in token.unique().tolist():  # few tokens: see the module's purpose
            pairs = (token == one).nonzero().squeeze(1)
            flat = score[pairs].flatten()
            best = flat.topk(min(rule.count or 0, len(flat)), sorted=False).indices
            keep[pairs[best // score.shape[1]], best % score.shape[1]] = True
    pair, inside = keep.nonzero(as_tuple=True)
    order = torch.argsort(token[pair], stable=True)
    return pair[order], inside[order]

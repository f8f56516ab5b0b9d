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
from ..kernels import gated_neurons
from ..selection import Selection
from .base import is_plain
from .cpu import DTYPES, CpuExecutor, as_rows


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
    if rule.count is not None and rule.count < 1:
        raise PrismError(f"count must be 1 or more, got {rule.count}")
    reason = refusal(module, x)
    rows = packed_rows(module)
    if reason is not None or rows is None:
        raise PrismError(f"neurons of this layer cannot be skipped: {reason}")
    neurons = rows.down.shape[1]
    out = torch.zeros(x.shape, dtype=torch.float32)
    gated_neurons(
        as_rows(rows.gate_up),
        as_rows(rows.down),
        as_rows(x.contiguous()) if x.dtype in DTYPES else x.float().numpy(),
        selection.token.numpy(),
        selection.sub_expert.numpy(),
        selection.weight.float().numpy(),
        rule.scale.view(-1, neurons // n).numpy(),
        rule.count or 0,
        0.0 if rule.threshold is None else rule.threshold,
        neurons,
        n,
        out.numpy(),
    )
    return out.to(x.dtype)

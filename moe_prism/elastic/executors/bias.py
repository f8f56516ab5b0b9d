"""Gate and up biases of selected sub-experts, for executors that multiply rows of many experts at once."""

from __future__ import annotations

from torch import Tensor, nn

from ..selection import Selection


def add_gate_up_bias(module: nn.Module, projected: Tensor, selection: Selection, n: int, skipped: int = 0) -> Tensor:
    """``projected`` plus the biases of its rows, where the family has any.

    Args:
        module: stacked experts.
        projected: ``[S, 2c]``, laid out for ``_apply_gate``.
        selection: the S pairs.
        n: sub-experts of one expert.
        skipped: leading neurons of every sub-expert that are not among the c.
    """
    if not module.has_bias:
        return projected
    bias: Tensor = module.gate_up_proj_bias  # type: ignore[assignment]
    experts = len(bias)
    if module.is_concatenated:
        mine = bias.view(experts, 2, n, -1).transpose(1, 2)[..., skipped:].reshape(experts * n, -1)
    else:
        mine = bias.view(experts * n, -1)[:, 2 * skipped :]
    return projected + mine[selection.sub_expert].to(projected.dtype)

"""Data parallelism: in every MoE layer the ranks' tokens meet, and in the first one of a step their budgets come along.

vLLM spreads the experts over all data-parallel ranks, so every rank runs its part of them for everybody's tokens and
gets back the sums of its own. The collectives are vLLM's, and so is the order of the tokens; the budgets are one column
more in the first one, so that ranks which have nothing to do, and run a dummy step, take part as well. Knows nothing of
requests or of weights.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_ep_group
from vllm.forward_context import get_forward_context

from ..elastic.dial import Dial
from ..errors import PrismError

_KEY = "moe_prism_budgets"  # in the forward context: this pass's budgets have been exchanged
NOBODY = 0  # the budget of a dummy step's tokens


class Exchange:
    """What stands between a rank's tokens and those that its experts run; one for all layers of a model.

    Args:
        dial: holds the budgets of all ranks' tokens from the first MoE layer of a forward pass on.
    """

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self._mine: Tensor | None = None

    def fill(self, budgets: Tensor | None) -> None:
        """Budgets of this rank's tokens in its next forward pass, int64 ``[T]``; None: it is a dummy step."""
        self._mine = budgets
        self._dial.fill(None)

    def gather(self, x: Tensor, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All ranks' tokens in the order of ranks, with the router's choice for them; the dial has their budgets then.

        Args:
            x: this rank's ``[T, H]``.
            weights: ``[T, k]``.
            ids: ``[T, k]``.
        """
        context = get_forward_context()
        first = _KEY not in context.additional_kwargs
        extra = [self._column(x)] if first else None
        with _sizes(context):
            found: Any = get_ep_group().dispatch(x, weights, ids, extra_tensors=extra)
        if first:
            context.additional_kwargs[_KEY] = True
            self._dial.fill(budgets_of_all(found[3][0].cpu(), self._dial.full_budget))
        return found[0], found[1], found[2]

    def combine(self, out: Tensor) -> Tensor:
        """This rank's tokens' sums over what all ranks computed, ``[T, H]`` of everybody's partial sums."""
        with _sizes(get_forward_context()):
            own: Tensor = get_ep_group().combine(out)
        return own

    def _column(self, x: Tensor) -> Tensor:
        if self._mine is None:
            return torch.full((len(x),), NOBODY, dtype=torch.int32, device=x.device)
        if len(self._mine) != len(x):
            raise PrismError(f"{len(self._mine)} budgets were filled in, but the step has {len(x)} tokens")
        return self._mine.to(x.device, torch.int32)


def budgets_of_all(column: Tensor, full_budget: int) -> Tensor | None:
    """What the dial is filled with: int64 ``[T]``; None if everybody runs everything, or nobody is there.

    Args:
        column: int32 ``[T]`` on the CPU, ``NOBODY`` where a token is no one's.
        full_budget: k * N.
    """
    if bool((column[column != NOBODY] == full_budget).all()):
        return None
    return column.long().clamp(min=1)  # a dummy token beside others is as cheap as can be


def _sizes(context: Any) -> AbstractContextManager[Any]:
    """Tells vLLM's collectives how many tokens each rank has; its layers have done so already unless compiled."""
    metadata = context.dp_metadata
    return nullcontext() if metadata.local_sizes is not None else metadata.sp_local_sizes(1)

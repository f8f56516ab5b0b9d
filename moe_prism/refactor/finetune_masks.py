"""Choices that carry gradients: which scores are among the best of a row.

A choice is discrete: its derivative is zero, or does not exist. The straight-through estimate puts the choice out as
it is and differentiates a smooth one instead, ``sigmoid((score - threshold) / temperature)``, whose threshold moves so
that as many are chosen as before: what one score gains, those near the threshold lose. Knows nothing of experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def smooth_choice(scores: Tensor, threshold: Tensor, temperature: float) -> Tensor:
    """``[T, S]`` in (0, 1): the smooth form of ``scores > threshold``, for a threshold ``[T, 1]``."""
    return torch.sigmoid((scores - threshold) / temperature)


def threshold_between(scores: Tensor, chosen: Tensor) -> Tensor:
    """Half-way between the least chosen score and the best of the others: ``[T, 1]``.

    Args:
        scores: ``[T, S]``; -inf where nothing can be chosen.
        chosen: bool ``[T, S]``. A row in which nothing is left to choose from, or nothing is chosen, has its threshold
            at the score of the other side.
    """
    least = scores.masked_fill(~chosen, torch.inf).amin(dim=1, keepdim=True)
    rest = scores.masked_fill(chosen, -torch.inf).amax(dim=1, keepdim=True)
    least, rest = torch.where(least.isinf(), rest, least), torch.where(rest.isinf(), least, rest)
    return (least + rest) / 2


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, chosen: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(scores, chosen)
        ctx.temperature = temperature
        return chosen.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        scores, chosen = ctx.saved_tensors
        threshold = threshold_between(scores, chosen)
        return through_smooth(scores, threshold, ctx.temperature, gradients[0]), None, None


def through_smooth(scores: Tensor, threshold: Tensor, temperature: float, gradient: Tensor) -> Tensor:
    """Gradient of the scores, from the gradient ``[T, S]`` of the smooth choice that keeps the sum of every row.

    With ``d_i`` the slope at score i, the threshold moves by ``sum d_i ds_i / sum d_i``.
    """
    soft = smooth_choice(scores, threshold, temperature)
    slope = soft * (1 - soft) / temperature
    total = slope.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return slope * (gradient - (slope * gradient).sum(dim=1, keepdim=True) / total)


def straight_through(scores: Tensor, chosen: Tensor, temperature: float) -> Tensor:
    """The choice as 0 and 1, in the dtype of the scores, with the gradient of ``through_smooth``.

    Args:
        scores: ``[T, S]``; -inf where nothing can be chosen.
        chosen: bool ``[T, S]``, the best of every row.
        temperature: how far from the threshold a score still learns, in units of the scores.
    """
    out: Tensor = _StraightThrough.apply(scores, chosen, temperature)  # type: ignore[no-untyped-call]
    return out

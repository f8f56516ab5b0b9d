"""Requests whose prompt is done, and the time of a step in which they decode at every excess.

Knows no prompts and no order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..cost_model import CostModel, Floats, Ints


class Decoding(NamedTuple):
    """Those who decode, ``[D]``, and what they leave for a step.

    Attributes:
        names: their ids.
        floor, most: bounds of their budgets.
        before: excess of the step before, None where there was none.
        steady: seconds of a step that keeps their pace; infinite where D = 0.
        lent: seconds of a step with prompts in it.
        curve: seconds that decoding adds to a step at every excess, ``[F]``.
        capped: the same if no more different sub-experts are loaded than the floors need, ``[F]``.
        beside: what it adds to a step with prompts in it, ``[F]``.
    """

    names: list[str]
    floor: Ints
    most: Ints
    before: int | None
    steady: float
    lent: float
    curve: Floats
    capped: Floats
    beside: Floats

    def budgets(self, excess: int) -> Ints:
        """Of each, ``[D]``."""
        found: Ints = np.minimum(self.most, self.floor + excess)
        return found


def curves(cost: CostModel, floor: Ints, most: Ints, context: float, *, capped: bool) -> tuple[Floats, Floats, Floats]:
    """``curve``, ``capped`` and ``beside`` of ``Decoding``; requests of equal bounds are counted, not gone through one
    by one.

    Args:
        cost: predicts times.
        floor, most: ``[D]``.
        context: the sum of their tokens so far.
        capped: whether a cap is of interest; else the first two are the same.
    """
    full = cost.full_budget
    kinds, counts = np.unique(floor * (full + 1) + most, return_counts=True)
    low, high = np.divmod(kinds, full + 1)
    budgets = np.minimum(high, low + np.arange(full)[:, None])
    curve, beside = cost.decode_curves(budgets, context, counts=counts)
    if not capped or not len(floor):
        return curve, curve, beside
    touched = np.full(full, cost.touched(budgets[:1], counts)[0])
    return curve, cost.decode_curve(budgets, context, touched, counts), beside


def excess_before(last: Ints, floor: Ints, most: Ints, full_budget: int) -> int | None:
    """The excess of the step before from its budgets ``[D]``, 0 for those who did not decode; None if nobody did."""
    decoded = last > 0
    if not decoded.any():
        return None
    below = decoded & (last < np.minimum(most, floor + full_budget - 1))
    if not below.any():
        return full_budget - 1
    return max(0, int((last - floor)[below].min()))

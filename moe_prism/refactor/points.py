"""Propose the budgets to publish: as many as can be told apart when they are measured.

A coarse sweep on calibration text gives, between measured budgets, what one more unit of budget gains a token on
average and how much that varies. Unit for unit both add up (for the variance that is cautious: steps smaller than those
measured vary less than in proportion). Going down from full budget, the next point is the first whose loss would differ
by ``MARGIN`` standard errors on as many tokens as will be measured. What is distinct is still decided by that
measurement alone (``evaluation.points``), which asks for two, and for the same order on other text and after another
calibration: the rest of the margin is for these. Knows nothing of other texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint.schema import ElasticConfig
from ..elastic import attach, budget, dial_of
from ..elastic.model import detach
from ..evaluation.measure import Run, measure
from ..evaluation.points import Series, paired_difference
from .recipe import Recipe
from .workspace import Workspace

MARGIN = 5.0
TOKENS = 4096
STEP = 1.4


def with_points(
    recipe: Recipe,
    model: PreTrainedModel,
    windows: Tensor,
    elastic: ElasticConfig,
    tensors: dict[str, Tensor],
    work: Workspace,
    tell: Callable[[str, int, int], None],
) -> Recipe:
    """The recipe with its points chosen for a refactored model, which is stock again on return."""
    budgets = work.numbers("points")
    if budgets is None:
        implementation: str = model.config._experts_implementation
        attach(model, elastic, tensors)
        try:
            report = partial(tell, "points")
            budgets = choose_points(model, windows, recipe.points_tokens, report)
        finally:
            detach(model, implementation)
        work.keep_numbers("points", budgets)
    return recipe.model_copy(update={"points": [k / elastic.full_budget for k in budgets]})


def choose_points(
    model: PreTrainedModel, windows: Tensor, tokens: int, progress: Callable[[int, int], None] | None = None
) -> list[int]:
    """The proposed budgets, ascending, full budget among them.

    Args:
        model: elastic.
        windows: int64 ``[n, context]`` calibration tokens; the last ``TOKENS`` are used.
        tokens: that the points will be measured on.
        progress: called with (forward passes done, in all).
    """
    full = dial_of(model).full_budget
    held = windows[-max(1, TOKENS // windows.shape[1]) :]
    probes = probes_of(full)
    runs = [Run(str(k), None if k == full else partial(budget, model, k)) for k in probes]
    measured = measure(model, held, runs, progress=progress)
    return proposed({k: measured[str(k)] for k in probes}, tokens)


def probes_of(full: int) -> list[int]:
    """1, full budget and what lies between in steps of ``STEP``."""
    found = [1]
    while found[-1] < full:
        found.append(min(full, max(found[-1] + 1, round(STEP * found[-1]))))
    return found


def proposed(series: Series, tokens: int) -> list[int]:
    """Budgets of which neighbours should differ by ``MARGIN`` standard errors on ``tokens`` tokens, ascending.

    Args:
        series: the coarse sweep, with budget 1 and full budget.
        tokens: of the measurement to come.
    """
    gains, variances = _per_unit(series)
    points = [max(series)]
    gain = variance = 0.0
    for k in range(max(series) - 1, 0, -1):
        gain, variance = gain + gains[k - 1], variance + variances[k - 1]
        if gain > 0 and gain * gain * tokens >= MARGIN**2 * variance:
            points.append(k)
            gain = variance = 0.0
    return points[::-1]


def _per_unit(series: Series) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of what the unit above every budget gains a token: each ``[full - 1]``."""
    budgets: Sequence[int] = sorted(series)
    gains, variances = np.zeros(budgets[-1] - 1), np.zeros(budgets[-1] - 1)
    for low, high in pairwise(budgets):
        mean, error = paired_difference(series[low].nll, series[high].nll)
        gains[low - 1 : high - 1] = mean / (high - low)
        variances[low - 1 : high - 1] = error**2 * len(series[low].nll) / (high - low)
    return gains, variances

"""Spread a budget over the layers: the same mean, more where more helps.

What helps is measured: how far KL to the full model falls on calibration text when one layer gets half as much again
and the others do not, at a few budgets. One unit after the other then goes to the layer that gains most from it, which
is the best allocation of every total where gains add up and fall, and never gives a layer less at a higher budget.
(Measured with the others at full, the gains of small budgets mislead: layers are starved together.) Knows nothing of
how a layer spends its budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ..elastic import budget, dial_of
from ..elastic.budgets import elastic_layers
from ..evaluation.measure import Run, measure

SHARES = (0.0625, 0.125, 0.25, 0.375, 0.5, 0.75)
MORE = 1.5
TOKENS = 1024


def choose_layer_budgets(
    model: PreTrainedModel, windows: Tensor, progress: Callable[[int, int], None] | None = None
) -> list[int]:
    """The budget of every layer for the budgets 1..full, row after row: ``full * L`` numbers.

    Args:
        model: elastic, complete otherwise.
        windows: int64 ``[n, context]`` calibration tokens; the first ``TOKENS`` are used.
        progress: called with (forward passes done, in all).
    """
    full, layers = dial_of(model).full_budget, len(elastic_layers(model))
    steps = {
        k: min(full, max(k + 1, round(MORE * k))) for k in sorted({max(1, int(s * full)) for s in SHARES} - {full})
    }
    runs = {(k, None): Run(f"{k}", partial(budget, model, k)) for k in steps} | {
        (k, layer): Run(f"{k}, {more} in layer {layer}", partial(_more_in, model, layer, k, more))
        for k, more in steps.items()
        for layer in range(layers)
    }
    measured = measure(model, windows[: max(1, TOKENS // windows.shape[1])], list(runs.values()), progress=progress)
    kl = {key: measured[run.name].kl for key, run in runs.items()}
    middles = [(k + more) / 2 for k, more in steps.items()]
    gains = [[(kl[k, None] - kl[k, layer]) / (more - k) for k, more in steps.items()] for layer in range(layers)]
    return [k for row in spread([gain_of_units(middles, each, full) for each in gains]) for k in row]


def gain_of_units(middles: Sequence[float], gains: Sequence[float], full: int) -> NDArray[np.float64]:
    """What every unit beyond the first gains a layer, never more than the unit before: ``[full - 1]``.

    Gains fall about exponentially, so between the measured ones their logarithms are interpolated; a gain that was not
    positive counts as a thousandth of the largest.
    """
    least = max(*gains, 1e-9) * 1e-3
    falling = np.minimum.accumulate(np.maximum(gains, least))
    out: NDArray[np.float64] = np.exp(np.interp(np.arange(1.5, full), middles, np.log(falling)))
    return out


def spread(gains: Sequence[NDArray[np.float64]]) -> list[list[int]]:
    """Budgets of every layer for the means 1..full; among equals the first unit of the first layer is given first.

    Args:
        gains: of every layer, what its units beyond the first gain, ``[full - 1]``; not rising.
    """
    units = sorted((-gain, unit, layer) for layer, each in enumerate(gains) for unit, gain in enumerate(each))
    mine = [1] * len(gains)
    rows = [list(mine)]
    for row in range(len(gains[0])):
        for _, _, layer in units[row * len(gains) : (row + 1) * len(gains)]:
            mine[layer] += 1
        rows.append(list(mine))
    return rows


@contextmanager
def _more_in(model: PreTrainedModel, layer: int, k_active: int, more: int) -> Iterator[None]:
    """One layer at a larger budget than the others."""
    dial = dial_of(model)
    before = dial.spread
    table = torch.full((len(elastic_layers(model)), dial.full_budget + 1), k_active)
    table[layer] = more
    dial.spread = table
    try:
        with budget(model, 1):
            yield
    finally:
        dial.spread = before

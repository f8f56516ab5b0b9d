"""Spread a budget over the layers: the same mean, more where a small budget costs more.

What a layer loses is measured: KL to the full model on calibration text with one layer at a budget and the others at
full, at a few budgets. Losses of layers are taken to add up. One unit after the other then goes to the layer that gains
most from it; on convex curves that is the best allocation of every total, and a higher budget never gives a layer less.
Knows nothing of how a layer spends its budget.
"""

from __future__ import annotations

import heapq
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
    probes = sorted({max(1, round(share * full)) for share in SHARES} - {full})
    runs = {
        (layer, k): Run(f"{k} in layer {layer}", partial(_only, model, layer, k))
        for layer in range(layers)
        for k in probes
    }
    measured = measure(model, windows[: max(1, TOKENS // windows.shape[1])], list(runs.values()), progress=progress)
    losses = [[measured[runs[layer, k].name].kl for k in probes] for layer in range(layers)]
    return [k for row in spread([curve(probes, each, full) for each in losses]) for k in row]


def curve(probes: Sequence[int], losses: Sequence[float], full: int) -> NDArray[np.float64]:
    """The loss of every budget 1..full, made convex and falling to zero: ``[full]``.

    Losses fall about exponentially, so they are interpolated as logarithms, shifted by a thousandth of the largest.
    """
    shift = max(*losses, 1e-9) * 1e-3
    falling = np.minimum.accumulate(np.maximum([*losses, 0.0], 0.0))
    budgets = np.arange(1, full + 1)
    values = np.exp(np.interp(budgets, [*probes, full], np.log(falling + shift))) - shift
    return convex(values)


def convex(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest convex sequence that is nowhere above the given one."""
    hull: list[int] = []
    for i in range(len(values)):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (values[b] - values[a]) * (i - a) < (values[i] - values[a]) * (b - a):
                break
            hull.pop()
        hull.append(i)
    return np.interp(np.arange(len(values)), hull, values[hull])


def spread(curves: Sequence[NDArray[np.float64]]) -> list[list[int]]:
    """Budgets of every layer for the means 1..full; among equals the first layer is served first.

    Args:
        curves: of every layer, its loss at the budgets 1..full; convex and not rising.
    """
    full = len(curves[0])
    mine = [1] * len(curves)
    waiting = [(float(each[1] - each[0]), layer) for layer, each in enumerate(curves) if full > 1]
    heapq.heapify(waiting)
    rows = [list(mine)]
    for _ in range(full - 1):
        for _ in curves:
            _, layer = heapq.heappop(waiting)
            mine[layer] += 1
            if mine[layer] < full:
                k, each = mine[layer], curves[layer]
                heapq.heappush(waiting, (float(each[k] - each[k - 1]), layer))
        rows.append(list(mine))
    return rows


@contextmanager
def _only(model: PreTrainedModel, layer: int, k_active: int) -> Iterator[None]:
    """One layer at a budget, the others at full."""
    dial = dial_of(model)
    before = dial.spread
    alone = torch.full((len(elastic_layers(model)), dial.full_budget + 1), dial.full_budget)
    alone[layer] = k_active
    dial.spread = alone
    try:
        with budget(model, 1):
            yield
    finally:
        dial.spread = before

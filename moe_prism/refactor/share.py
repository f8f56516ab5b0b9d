"""Fit how tokens of a request share its budget: thresholds of every layer and budget, and how far to go.

The threshold of a budget K is the value that K of a token's scores exceed on average, over calibration tokens of the
full model. How far tokens depart from their budget is measured: KL to the full model at a few budgets, for a few
strengths, interpolated between. Knows nothing of what a token's budget is spent on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..elastic import budget, dial_of
from ..elastic.budgets import elastic_layers
from ..elastic.layer import ElasticLayer
from ..elastic.sharing import Sharing, relative_scores
from ..evaluation.measure import Run, measure
from .watch import watch_layers

SHARES = (0.125, 0.25, 0.5, 0.75)
STRENGTHS = (0.0, 0.5, 1.0)
TOKENS = 1024  # for strengths
TOKENS_OF_THRESHOLDS = 4096


@torch.no_grad()
def fit_thresholds(
    model: PreTrainedModel, windows: Tensor, progress: Callable[[int, int], None] | None = None
) -> dict[str, Tensor]:
    """Thresholds of every layer: its name -> fp32 ``[full + 1]``, by budget; index 0 is not used.

    Args:
        model: elastic; it runs at full budget.
        windows: int64 ``[n, context]`` calibration tokens; the first ``TOKENS_OF_THRESHOLDS`` are used.
        progress: called with (batches done, in all).
    """
    full = dial_of(model).full_budget
    seen: dict[str, list[Tensor]] = {}

    def see(name: str, state: ElasticLayer, x: Tensor, index: Tensor, weights: Tensor, _out: Tensor) -> None:
        module, n = modules[name], state.num_sub_experts
        scores = state.gate.score(module, state.on(x.device), x, index, n).values
        seen.setdefault(name, []).append(relative_scores(scores, weights, state.gate.weighted).cpu())

    modules = {layer.name: layer.module for layer, _ in elastic_layers(model)}
    watchers = {layer.name: partial(see, layer.name, state) for layer, state in elastic_layers(model)}
    some = windows[: max(1, TOKENS_OF_THRESHOLDS // windows.shape[1])]
    with budget(model, full):
        watch_layers(model, some, watchers, progress)
    return {name: _thresholds(torch.cat(parts), full) for name, parts in seen.items()}


def _thresholds(relative: Tensor, full: int) -> Tensor:
    values = relative.flatten().sort(descending=True).values
    ends = torch.arange(1, full) * len(relative)  # as many of all scores exceed it as K a token
    return torch.cat([torch.tensor([torch.inf]), values[ends], torch.tensor([-torch.inf])])


def choose_strength(
    model: PreTrainedModel, windows: Tensor, progress: Callable[[int, int], None] | None = None
) -> list[float]:
    """How far tokens depart from the budgets 1..full, 0 to 1, by measurement.

    Args:
        model: elastic, with thresholds attached.
        windows: int64 ``[n, context]`` calibration tokens; the last ``TOKENS`` are used.
        progress: called with (forward passes done, in all).
    """
    full = dial_of(model).full_budget
    held = windows[-max(1, TOKENS // windows.shape[1]) :]
    probes = sorted({max(1, round(share * full)) for share in SHARES})
    runs = {
        (k, strength): Run(f"{k} by {strength}", partial(_sharing, model, k, strength))
        for k in probes
        for strength in STRENGTHS
    }
    measured = measure(model, held, list(runs.values()), progress=progress)
    best = [min(STRENGTHS, key=lambda strength: measured[runs[k, strength].name].kl) for k in probes]
    return [round(float(part), 3) for part in np.interp(np.arange(1, full + 1), probes, best)]


@contextmanager
def _sharing(model: PreTrainedModel, k_active: int, strength: float) -> Iterator[None]:
    dial = dial_of(model)
    before = dial.sharing
    dial.sharing = Sharing([strength] * dial.full_budget, len(elastic_layers(model)))
    try:
        with budget(model, k_active):
            yield
    finally:
        dial.sharing = before

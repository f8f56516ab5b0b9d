"""Choose how every budget is spent: how many sub-experts' gates to look at before neurons are chosen inside them.

Looking at more of them finds better neurons, but leaves less for running them. What is best depends on the model and on
the budget, so it is measured: KL to the full model on calibration text, at a few budgets, for a few ratios of looked-at
to paid-for sub-experts. In between, the ratio is interpolated. Knows nothing of what else a budget adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from ..elastic import budget, dial_of
from ..elastic.plan import Plan, most_looked_at
from ..evaluation.measure import Run, measure

SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
RATIOS = (1.0, 1.4, 1.8, 2.2, 2.6)
TOKENS = 1024


def scan_of(ratios: Sequence[float], size: int, block: int) -> list[int]:
    """Sub-experts of ``size`` neurons to look at for the budgets 1, 2, ..., as far as a block can be paid after it."""
    full = len(ratios)
    return [max(k, min(full, most_looked_at(k, size, block), round(ratio * k))) for k, ratio in enumerate(ratios, 1)]


def choose_scan(
    model: PreTrainedModel,
    windows: Tensor,
    size: int,
    block: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[int]:
    """The best number for every budget, by measurement.

    Args:
        model: elastic, with neuron scales attached.
        windows: int64 ``[n, context]`` calibration tokens; the last ``TOKENS`` are used.
        size: neurons of a sub-expert.
        block: neurons that are chosen together.
        progress: called with (forward passes done, in all).
    """
    full = dial_of(model).full_budget
    held = windows[-max(1, TOKENS // windows.shape[1]) :]
    # Equal scans of different ratios (small budgets) are measured once.
    runs: dict[tuple[int, int], Run] = {}
    probes = sorted({max(1, round(share * full)) for share in SHARES})
    for k in probes:
        for ratio in RATIOS:
            scan = scan_of([ratio] * full, size, block)
            name = f"{k} of {scan[k - 1]}"
            runs[k, scan[k - 1]] = Run(name, partial(spending, model, k, Plan(scan, size, block)))
    measured = measure(model, held, list(runs.values()), progress=progress)
    best = []
    for k in probes:
        found = {scan: measured[run.name].kl for (budget_, scan), run in runs.items() if budget_ == k}
        best.append(min(found, key=lambda scan: found[scan]) / k)
    return scan_of(np.interp(np.arange(1, full + 1), probes, best).tolist(), size, block)


@contextmanager
def spending(model: PreTrainedModel, k_active: int, plan: Plan) -> Iterator[None]:
    """A budget that is spent by another plan than the dial's."""
    dial = dial_of(model)
    before = dial.plan
    dial.plan = plan
    try:
        with budget(model, k_active):
            yield
    finally:
        dial.plan = before

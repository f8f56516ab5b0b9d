"""Choose the rung of every budget of the ladder: how many gates to look at, and how many neurons to raise to 8 bits.

What is best depends on the model, so it is measured: KL to the full model on calibration text, at a few budgets, first
for a few numbers of sub-experts to look at, then for a few ratios of raised to run neurons. In between, both are
interpolated. Knows nothing of what else a budget adds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from ..elastic import dial_of
from ..elastic.ladder import LadderPlan, Rung, most_scanned, rung_within
from ..evaluation.measure import Run, measure
from .spend import TOKENS, spending

SHARES = (0.0625, 0.125, 0.1875, 0.25, 0.3125)
SCANS = (1.0, 0.75, 0.5)
RATIOS = (0.0, 0.05, 0.1, 0.2, 0.4)
FIRST = 0.1


def rungs_of(scans: Sequence[float], ratios: Sequence[float], full: int, size: int) -> list[Rung]:
    """The rungs of the budgets 1, 2, ... below full, from shares of what can be looked at and ratios."""
    return [
        rung_within(k, max(1, round(scan * most_scanned(k, full))), size, ratio)
        for k, (scan, ratio) in enumerate(zip(scans, ratios, strict=True), 1)
    ]


def choose_rungs(
    model: PreTrainedModel, windows: Tensor, size: int, progress: Callable[[int, int], None] | None = None
) -> list[Rung]:
    """The best rung for every budget, by measurement.

    Args:
        model: elastic, with a shadow and neuron scales attached.
        windows: int64 ``[n, context]`` calibration tokens; the last ``TOKENS`` are used.
        size: neurons of a sub-expert.
        progress: called with (forward passes done, in all).
    """
    full = dial_of(model).full_budget
    held = windows[-max(1, TOKENS // windows.shape[1]) :]
    probes = sorted({max(1, round(share * full)) for share in SHARES} - {full})

    def best(
        choices: dict[int, list[tuple[float, float]]], tell: Callable[[int, int], None]
    ) -> list[tuple[float, float]]:
        runs: dict[tuple[int, Rung], Run] = {}
        rungs = {}
        for k, mine in choices.items():
            for scan, ratio in mine:
                found = rungs_of([scan] * (full - 1), [ratio] * (full - 1), full, size)
                rungs[k, scan, ratio] = found[k - 1]
                apply = partial(spending, model, k, LadderPlan(found, size))
                runs.setdefault((k, found[k - 1]), Run(f"{k}: {found[k - 1]}", apply))
        measured = measure(model, held, list(runs.values()), progress=tell)

        def kl(k: int, choice: tuple[float, float]) -> float:
            return measured[runs[k, rungs[k, *choice]].name].kl

        return [min(mine, key=lambda choice, k=k: kl(k, choice)) for k, mine in choices.items()]  # type: ignore[misc]

    def half(number: int) -> Callable[[int, int], None]:
        return lambda done, total: progress(number * total + done, 2 * total) if progress else None

    first = best({k: [(scan, FIRST) for scan in SCANS] for k in probes}, half(0))
    second = best({k: [(scan, ratio) for ratio in RATIOS] for k, (scan, _) in zip(probes, first, strict=True)}, half(1))
    at = np.arange(1, full)
    scans, ratios = (np.interp(at, probes, column).tolist() for column in zip(*second, strict=True))
    return rungs_of(scans, ratios, full, size)

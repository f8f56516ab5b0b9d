"""From measured steps to a cost model: non-negative least squares, and errors on steps that the fit has not seen.

Knows no engine: who measures is ``moe_prism.bench``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import PrismError
from .cost_model import CostModel
from .step_load import TERMS, MeasuredStep, StepLoad

HELD_OUT = 0.25  # share of measured steps that errors are measured on


def fit(loads: Sequence[StepLoad], seconds: Sequence[float]) -> tuple[float, ...]:
    """Coefficients by non-negative least squares on relative errors.

    Args:
        loads: measured steps, at least as many as terms.
        seconds: time of each, above 0.

    Raises:
        PrismError: too few steps, or a time that is not positive.
    """
    from scipy.optimize import nnls

    times = np.asarray(seconds, dtype=float)
    if len(loads) != len(times) or len(loads) < len(TERMS):
        raise PrismError(
            f"a fit needs a time for each of at least {len(TERMS)} measured steps, got {len(loads)} steps and "
            f"{len(times)} times"
        )
    if not (np.isfinite(times).all() and (times > 0).all()):
        raise PrismError(f"step times must be above 0 seconds, got {float(np.min(times))}")
    rows = np.array([load.terms() for load in loads]) / times[:, None]
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)  # columns of like size
    found, _ = nnls(rows / scale, np.ones(len(times)))
    return tuple(float(value) for value in found / scale)


def fit_held_out(loads: Sequence[StepLoad], seconds: Sequence[float], *, seed: int = 0, **identity: Any) -> CostModel:
    """A cost model whose errors were measured on steps that the fit has not seen.

    A quarter of the steps, drawn by ``seed``, is held out.

    Args:
        loads: measured steps, at least four for every three terms.
        seconds: time of each, above 0.
        seed: of the split.
        identity: the other fields of ``CostModel``: full_budget, sub_experts, bytes, engine, machine, checkpoint.

    Raises:
        PrismError: see ``fit``.
    """
    order = np.random.default_rng(seed).permutation(len(loads))
    held_out = set(order[: int(len(loads) * HELD_OUT)].tolist())
    measured = tuple(
        MeasuredStep(load, float(time), i in held_out)
        for i, (load, time) in enumerate(zip(loads, seconds, strict=True))
    )
    fitted, checked = ([m for m in measured if m.held_out is kept] for kept in (False, True))
    coefficients = fit([m.load for m in fitted], [m.seconds for m in fitted])
    model = CostModel(coefficients, seed=seed, measured=measured, **identity)
    median, p95 = errors(model, [m.load for m in checked], [m.seconds for m in checked])
    return replace(model, median_error=median, p95_error=p95)


def errors(model: CostModel, loads: Sequence[StepLoad], seconds: Sequence[float]) -> tuple[float, float]:
    """Relative errors of predictions: median and 95th percentile."""
    relative = [abs(model.seconds(load) / time - 1) for load, time in zip(loads, seconds, strict=True)]
    return float(np.median(relative)), float(np.percentile(relative, 95))


def fit_memory(tokens: Sequence[float], measured_bytes: Sequence[float]) -> tuple[int, int]:
    """(fixed_bytes, token_bytes) of measured memory against tokens held, by non-negative least squares.

    Raises:
        PrismError: fewer than two different numbers of tokens.
    """
    from scipy.optimize import nnls

    if len(tokens) != len(measured_bytes) or len(set(tokens)) < 2:
        raise PrismError(f"a fit of memory needs at least two different numbers of tokens, got {list(tokens)}")
    held = np.asarray(tokens, dtype=float)
    found, _ = nnls(np.stack([np.ones(len(held)), held / held.max()], 1), np.asarray(measured_bytes, dtype=float))
    return round(float(found[0])), round(float(found[1] / held.max()))

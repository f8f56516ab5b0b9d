"""Fits on steps whose coefficients are known, and their errors on steps that were held out."""

from __future__ import annotations

import numpy as np
import pytest
from scheduling_samples import FULL, SUB_EXPERTS, cost_model, steps

from moe_prism.errors import PrismError
from moe_prism.scheduling import CostModel, StepLoad
from moe_prism.scheduling.cost_fit import errors, fit, fit_held_out, fit_memory
from moe_prism.scheduling.step_load import TERMS

COST = cost_model()


def test_a_fit_finds_the_coefficients_and_knows_its_errors() -> None:
    rng = np.random.default_rng(0)
    loads = steps(rng, 200)
    exact = [COST.seconds(load) for load in loads]
    assert fit(loads, exact) == pytest.approx(COST.coefficients, rel=1e-3, abs=1e-9)
    noisy = [seconds * float(rng.uniform(0.9, 1.1)) for seconds in exact]
    model = fit_held_out(loads, noisy, seed=3, full_budget=FULL, sub_experts=SUB_EXPERTS, engine="e")
    assert all(c >= 0 for c in model.coefficients)
    held_out = [m for m in model.measured if m.held_out]
    assert len(held_out) == 50
    again = errors(model, [m.load for m in held_out], [m.seconds for m in held_out])
    assert (model.median_error, model.p95_error) == again
    assert 0.02 < model.median_error < 0.08
    assert 0.05 < model.p95_error < 0.15
    fitted = [m for m in model.measured if not m.held_out]
    assert model.coefficients == fit([m.load for m in fitted], [m.seconds for m in fitted])
    assert model == fit_held_out(loads, noisy, seed=3, full_budget=FULL, sub_experts=SUB_EXPERTS, engine="e")
    other = fit_held_out(loads, noisy, seed=4, full_budget=FULL, sub_experts=SUB_EXPERTS)
    assert [m.held_out for m in other.measured] != [m.held_out for m in model.measured]


def test_memory_is_fixed_and_per_token() -> None:
    tokens = [0, 100, 1000, 5000]
    assert fit_memory(tokens, [2_000_000 + 512 * t for t in tokens]) == (2_000_000, 512)
    model = cost_model()
    model = CostModel(model.coefficients, FULL, SUB_EXPERTS, token_bytes=512, fixed_bytes=2_000_000)
    assert model.memory_bytes(1000) == 2_512_000
    with pytest.raises(PrismError, match="two different numbers"):
        fit_memory([5, 5], [1, 2])


@pytest.mark.parametrize(
    ("loads", "seconds", "message"),
    [
        ([StepLoad()] * 3, [1.0] * 3, f"at least {len(TERMS)} measured steps"),
        ([StepLoad()] * 20, [1.0] * 19, "20 steps and 19 times"),
        ([StepLoad()] * 20, [1.0] * 19 + [0.0], "above 0 seconds, got 0.0"),
    ],
)
def test_a_fit_refuses(loads, seconds, message) -> None:
    with pytest.raises(PrismError, match=message):
        fit(loads, seconds)

"""How long a step takes: a few terms with non-negative coefficients, fitted once to measured steps.

A step has P prompt tokens and D decoding requests, each with its budget k_i of F = k * N. The terms are

    1, [P > 0], P, sum over prompt tokens of k_i / F, D, sum over decoding requests of k_i / F, touched, context

where *touched* is the expected share of all sub-experts that the decoding requests use, 1 - product of
(1 - k_i / (E N)), which is what a memory-bound step reads, and *context* is the sum of the decoding requests' tokens so
far. With equal budgets this is the paper's C(batch, k_active) (arXiv 2510.19366, phase 2). Knows no engine: who
measures is ``moe_prism.bench``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from ..errors import PrismError

VERSION = 1
TERMS = ("step", "prefill", "prefill_tokens", "prefill_work", "decode", "decode_work", "touched", "context")


class StepLoad(NamedTuple):
    """What a step computes.

    Attributes:
        prefill_tokens: P.
        prefill_work: sum over prompt tokens of budget / F.
        decode: D.
        decode_work: sum over decoding requests of budget / F.
        untouched: product over decoding requests of (1 - budget / (E N)).
        context: sum over decoding requests of their tokens so far.
    """

    prefill_tokens: float = 0.0
    prefill_work: float = 0.0
    decode: float = 0.0
    decode_work: float = 0.0
    untouched: float = 1.0
    context: float = 0.0

    def terms(self) -> tuple[float, ...]:
        """The values of ``TERMS``."""
        return (
            1.0,
            1.0 if self.prefill_tokens else 0.0,
            self.prefill_tokens,
            self.prefill_work,
            self.decode,
            self.decode_work,
            1.0 - self.untouched,
            self.context,
        )


@dataclass(frozen=True)
class CostModel:
    """Seconds of a step.

    Attributes:
        coefficients: one per term, seconds, none negative.
        full_budget: F = k * N.
        sub_experts: E * N of one layer.
        token_bytes: memory of one token's keys and values.
        fixed_bytes: memory of the weights.
        engine: what was measured, e.g. "embedded" or "vllm 0.32.0".
        machine: description of the machine; a cost model is used on that machine only.
        checkpoint: fingerprint of the weights.
        median_error: relative error on held-out steps, median.
        p95_error: the same, 95th percentile.
    """

    coefficients: tuple[float, ...]
    full_budget: int
    sub_experts: int
    token_bytes: int = 0
    fixed_bytes: int = 0
    engine: str = ""
    machine: str = ""
    checkpoint: str = ""
    median_error: float | None = None
    p95_error: float | None = None

    def __post_init__(self) -> None:
        values = np.asarray(self.coefficients, dtype=float)
        if values.shape != (len(TERMS),) or not np.isfinite(values).all() or (values < 0).any() or not values.any():
            raise PrismError(
                f"a cost model needs {len(TERMS)} coefficients ({', '.join(TERMS)}), none negative and not all zero; "
                f"got {self.coefficients}; measure again with `moe-prism profile-cost`"
            )
        if not 1 <= self.full_budget <= self.sub_experts:
            raise PrismError(f"full_budget must be from 1 to {self.sub_experts} sub-experts, got {self.full_budget}")

    def seconds(self, load: StepLoad) -> float:
        """Predicted time of a step."""
        return math.fsum(c * v for c, v in zip(self.coefficients, load.terms(), strict=True))

    def load(
        self,
        budgets: Sequence[int] | NDArray[np.int64],
        context: float = 0.0,
        prefill_tokens: Sequence[int] | NDArray[np.int64] = (),
        prefill_budgets: Sequence[int] | NDArray[np.int64] = (),
    ) -> StepLoad:
        """What a step of these requests computes.

        Args:
            budgets: of the decoding requests, ``[D]``.
            context: the sum of their tokens so far.
            prefill_tokens: prompt tokens of each prefilling request, ``[Q]``.
            prefill_budgets: budget of each, ``[Q]``.
        """
        k = np.asarray(budgets, dtype=float)
        p = np.asarray(prefill_tokens, dtype=float)
        work = float(p @ np.asarray(prefill_budgets, dtype=float)) / self.full_budget if len(p) else 0.0
        untouched = float(np.prod(1.0 - k / self.sub_experts)) if len(k) else 1.0
        return StepLoad(float(p.sum()), work, len(k), float(k.sum()) / self.full_budget, untouched, context)

    def table(self, batch: int, k_active: int, context: float = 0.0) -> float:
        """C(batch, k_active): seconds of one decode step of equal budgets (arXiv 2510.19366, phase 2)."""
        return self.seconds(self.load([k_active] * batch, context * batch))

    def require(self, *, engine: str, machine: str, checkpoint: str) -> None:
        """Raise PrismError where it was measured on another engine, machine or checkpoint."""
        found = {"engine": self.engine, "machine": self.machine, "checkpoint": self.checkpoint}
        wanted = {"engine": engine, "machine": machine, "checkpoint": checkpoint}
        for name, value in wanted.items():
            if found[name] != value:
                raise PrismError(
                    f"the cost model was measured for {name} {found[name]!r}, this is {value!r}; "
                    "measure here with `moe-prism profile-cost`"
                )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        record = asdict(self)
        record["coefficients"] = dict(zip(TERMS, self.coefficients, strict=True))
        return {"version": VERSION, **record}

    @staticmethod
    def from_dict(value: Any) -> CostModel:
        """The inverse; raises PrismError for another version or a damaged record."""
        if not isinstance(value, dict) or value.get("version") != VERSION:
            got = value.get("version") if isinstance(value, dict) else value
            raise PrismError(f"cost model version must be {VERSION}, got {got!r}; run `moe-prism profile-cost` again")
        fields = {name: item for name, item in value.items() if name != "version"}
        try:
            fields["coefficients"] = tuple(float(fields["coefficients"][name]) for name in TERMS)
            return CostModel(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise PrismError(f"cost model is damaged ({error}); run `moe-prism profile-cost` again") from None


def fit(loads: Sequence[StepLoad], seconds: Sequence[float]) -> tuple[float, ...]:
    """Coefficients by non-negative least squares on relative errors.

    Args:
        loads: measured steps, at least as many as terms.
        seconds: time of each, above 0.

    Raises:
        PrismError: too few steps, or a time that is not positive.
    """
    times = np.asarray(seconds, dtype=float)
    if len(loads) != len(times) or len(loads) < len(TERMS):
        raise PrismError(f"a fit needs at least {len(TERMS)} measured steps with a time each, got {len(loads)}")
    if not (np.isfinite(times).all() and (times > 0).all()):
        raise PrismError(f"step times must be above 0 seconds, got {float(np.min(times))}")
    rows = np.array([load.terms() for load in loads]) / times[:, None]
    scale = np.maximum(np.abs(rows).max(axis=0), 1e-300)  # columns of like size
    found, _ = nnls(rows / scale, np.ones(len(times)))
    return tuple(float(value) for value in found / scale)


def errors(model: CostModel, loads: Sequence[StepLoad], seconds: Sequence[float]) -> tuple[float, float]:
    """Relative errors of predictions: median and 95th percentile."""
    relative = [abs(model.seconds(load) / time - 1) for load, time in zip(loads, seconds, strict=True)]
    return float(np.median(relative)), float(np.percentile(relative, 95))

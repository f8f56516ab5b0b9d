"""How long a step takes and what it holds: a few terms with non-negative coefficients, fitted once to measured steps.

A step computes pieces of prompts (P tokens in all) and a next token for each of D decoding requests; k_i is a token's
budget, F = k * N. Its time is the sum of ``TERMS``, each times its coefficient:

    step, prefill_step, decode_step     1; [P > 0]; [D > 0]
    prefill_tokens, prefill_work        P; sum over prompt tokens of k_i / F
    prefill_context                     sum over prompt tokens of the tokens up to it, which attention reads
    decode_tokens, decode_work          D; sum over decoding requests of k_i / F
    touched                             expected share of all sub-experts that decoding requests use: what a step reads
    context                             sum over decoding requests of their tokens so far
    gated, gated_tokens                 of prompts and of decoding requests alike: whether any is below F; their tokens

*touched* is 1 - product of (1 - k_i / (E N)), or the cap on different sub-experts where that is less. At full budget
for all no gate runs, hence the last two. With equal budgets this is the paper's C(batch, k_active) (arXiv 2510.19366,
phase 2). Knows no engine: who measures is ``moe_prism.bench``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import PrismError

VERSION = 1
TERMS = (
    *("step", "prefill_step", "decode_step", "prefill_tokens", "prefill_work", "prefill_context"),
    *("decode_tokens", "decode_work", "touched", "context", "gated", "gated_tokens"),
)
HELD_OUT = 0.25  # share of measured steps that errors are measured on

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class StepLoad(NamedTuple):
    """What a step computes.

    Attributes:
        prefill_tokens: P.
        prefill_work: sum over prompt tokens of budget / F.
        decode: D.
        decode_work: sum over decoding requests of budget / F.
        untouched: expected share of sub-experts that no decoding request uses.
        context: sum over decoding requests of their tokens so far.
        prefill_context: sum over prompt tokens of the tokens up to it.
        gated: how many of the two, prompts and decoding requests, have somebody below full budget: 0, 1 or 2.
        gated_tokens: their tokens.
    """

    prefill_tokens: float = 0.0
    prefill_work: float = 0.0
    decode: float = 0.0
    decode_work: float = 0.0
    untouched: float = 1.0
    context: float = 0.0
    prefill_context: float = 0.0
    gated: float = 0.0
    gated_tokens: float = 0.0

    def terms(self) -> tuple[float, ...]:
        """The values of ``TERMS``."""
        return (
            *(1.0, float(self.prefill_tokens > 0), float(self.decode > 0)),
            *(self.prefill_tokens, self.prefill_work, self.prefill_context),
            *(self.decode, self.decode_work, 1.0 - self.untouched, self.context),
            *(self.gated, self.gated_tokens),
        )


class MeasuredStep(NamedTuple):
    """A step of the one-time benchmark.

    Attributes:
        load: what it computed.
        seconds: how long it took.
        held_out: it was kept out of the fit, and counts in the errors.
    """

    load: StepLoad
    seconds: float
    held_out: bool = False


@dataclass(frozen=True)
class CostModel:
    """Seconds of a step, bytes of what an engine holds.

    Attributes:
        coefficients: one per term, seconds, none negative.
        full_budget: F = k * N.
        sub_experts: E * N of one layer.
        token_bytes: memory of one token's keys and values.
        fixed_bytes: memory of everything else, the weights first.
        engine: what was measured, e.g. "embedded" or "vllm 0.32.0".
        machine: description of the machine; a cost model is used on that machine only.
        checkpoint: fingerprint of the weights (``ElasticCheckpoint.fingerprint``).
        seed: of the split into fitted and held-out steps.
        median_error: relative error on held-out steps, median; None where nothing was held out.
        p95_error: the same, 95th percentile.
        measured: the steps behind it.
    """

    coefficients: tuple[float, ...]
    full_budget: int
    sub_experts: int
    token_bytes: int = 0
    fixed_bytes: int = 0
    engine: str = ""
    machine: str = ""
    checkpoint: str = ""
    seed: int = 0
    median_error: float | None = None
    p95_error: float | None = None
    measured: tuple[MeasuredStep, ...] = field(default=(), repr=False)
    _by_name: dict[str, float] = field(init=False, repr=False, compare=False)
    _log_untouched: Floats = field(init=False, repr=False, compare=False)
    """log of the share of sub-experts that one request of budget k leaves untouched, k = 0 .. F"""

    def __post_init__(self) -> None:
        values = np.asarray(self.coefficients, dtype=float)
        if values.shape != (len(TERMS),) or not np.isfinite(values).all() or (values < 0).any() or not values.any():
            raise PrismError(
                f"a cost model needs {len(TERMS)} coefficients ({', '.join(TERMS)}), none negative and not all zero; "
                f"got {self.coefficients}; measure again with `moe-prism profile-cost`"
            )
        if not 1 <= self.full_budget <= self.sub_experts:
            raise PrismError(f"full_budget must be from 1 to {self.sub_experts} sub-experts, got {self.full_budget}")
        if self.token_bytes < 0 or self.fixed_bytes < 0:
            raise PrismError(f"bytes must not be negative, got {self.token_bytes} a token and {self.fixed_bytes}")
        object.__setattr__(self, "_by_name", dict(zip(TERMS, map(float, self.coefficients), strict=True)))
        with np.errstate(divide="ignore"):
            left = np.log1p(-np.arange(self.full_budget + 1) / self.sub_experts)
        object.__setattr__(self, "_log_untouched", left)

    def seconds(self, load: StepLoad) -> float:
        """Predicted time of a step."""
        return math.fsum(c * v for c, v in zip(self.coefficients, load.terms(), strict=True))

    def load(
        self,
        budgets: Sequence[int] | Ints,
        context: float = 0.0,
        prefill_tokens: Sequence[int] | Ints = (),
        prefill_budgets: Sequence[int] | Ints = (),
        prefill_starts: Sequence[int] | Ints | None = None,
        cap: int | None = None,
    ) -> StepLoad:
        """What a step of these requests computes.

        Args:
            budgets: of the decoding requests, ``[D]``.
            context: the sum of their tokens so far.
            prefill_tokens: prompt tokens of each piece, ``[Q]``, at least 1 each.
            prefill_budgets: budget of each, ``[Q]``.
            prefill_starts: prompt tokens computed before each piece, ``[Q]``; None: none.
            cap: different sub-experts that decoding requests may touch.
        """
        k = np.asarray(budgets, dtype=np.int64)
        p = np.asarray(prefill_tokens, dtype=float)
        q = np.asarray(prefill_budgets, dtype=np.int64)
        start = np.zeros(len(p)) if prefill_starts is None else np.asarray(prefill_starts, dtype=float)
        untouched = float(np.exp(self._log_untouched[k].sum())) if len(k) else 1.0
        if cap is not None and len(k):
            untouched = max(untouched, 1.0 - cap / self.sub_experts)
        below = bool((k < self.full_budget).any()), bool((q < self.full_budget).any())
        return StepLoad(
            float(p.sum()),
            float(p @ q) / self.full_budget if len(p) else 0.0,
            len(k),
            float(k.sum()) / self.full_budget,
            untouched,
            context if len(k) else 0.0,
            float((p * (start + (p + 1) / 2)).sum()),
            float(sum(below)),
            below[0] * len(k) + below[1] * float(p.sum()),
        )

    def decode_curve(self, budgets: Ints, context: float = 0.0, touched: Floats | None = None) -> Floats:
        """Seconds that decoding adds to a step, for several choices of budgets at once.

        Args:
            budgets: ``[X, D]``.
            context: sum of the requests' tokens so far.
            touched: share of sub-experts that each choice touches, ``[X]``; None: what the budgets touch.

        Returns:
            ``[X]``; all zero where D = 0.
        """
        batch = budgets.shape[1]
        if not batch:
            return np.zeros(len(budgets))
        c = self._by_name
        below = (budgets < self.full_budget).any(axis=1)
        constant = c["decode_step"] + c["decode_tokens"] * batch + c["context"] * context
        curve: Floats = (
            constant
            + c["decode_work"] / self.full_budget * budgets.sum(axis=1)
            + c["touched"] * (self.touched(budgets) if touched is None else touched)
            + (c["gated"] + c["gated_tokens"] * batch) * below
        )
        return curve

    def decode_growth(self, budgets: Ints, context: Floats) -> Floats:
        """Seconds that decoding adds to a step for the first r of these requests, ``[R]``, r = 1 .. R.

        Args:
            budgets: ``[R]``.
            context: tokens of each so far, ``[R]``.
        """
        c = self._by_name
        each = c["decode_tokens"] + c["decode_work"] / self.full_budget * budgets + c["context"] * context
        below = np.maximum.accumulate(budgets < self.full_budget)
        untouched = np.exp(np.cumsum(self._log_untouched[budgets]))
        gated = (c["gated"] + c["gated_tokens"] * np.arange(1, len(budgets) + 1)) * below
        growth: Floats = c["decode_step"] + np.cumsum(each) + c["touched"] * (1.0 - untouched) + gated
        return growth

    def touched(self, budgets: Ints) -> Floats:
        """Expected share of a layer's sub-experts that decoding requests of budgets ``[X, D]`` use, ``[X]``."""
        share: Floats = 1.0 - np.exp(self._log_untouched[budgets].sum(axis=1))
        return share

    def prefill_curve(self, tokens: Floats, starts: Floats, budgets: Ints) -> Floats:
        """Seconds that each prompt adds to a step that computes all of it, without what a step with prompts costs once.

        Args:
            tokens: of each piece, ``[Q]``.
            starts: tokens computed before it, ``[Q]``.
            budgets: ``[X, Q]``.

        Returns:
            ``[X, Q]``.
        """
        c = self._by_name
        reads = c["prefill_context"] * (starts + (tokens + 1) / 2)
        each = c["prefill_tokens"] + reads + c["prefill_work"] / self.full_budget * budgets
        curve: Floats = tokens * (each + c["gated_tokens"] * (budgets < self.full_budget))
        return curve

    def step_overhead(self, *, prompts: bool) -> float:
        """Seconds of a step before anything is computed, with or without prompts in it (and a gate for them)."""
        c = self._by_name
        return c["step"] + (c["prefill_step"] + c["gated"]) * prompts

    def table(self, batch: int, k_active: int, context: float = 0.0) -> float:
        """C(batch, k_active): seconds of one decode step of equal budgets (arXiv 2510.19366, phase 2).

        Args:
            batch: requests, at least 1.
            k_active: budget of each.
            context: tokens that each has so far.
        """
        below = float(k_active < self.full_budget)
        untouched = (1.0 - k_active / self.sub_experts) ** batch
        work = batch * k_active / self.full_budget
        return self.seconds(StepLoad(0.0, 0.0, batch, work, untouched, context * batch, 0.0, below, below * batch))

    def prefill_seconds(self, tokens: int, k_active: int, piece: int, start: int = 0) -> float:
        """Seconds to compute a prompt alone, in pieces of at most ``piece`` tokens, from its token ``start`` on."""
        total = 0.0
        for at in range(start, tokens, piece):
            total += self.seconds(self.load((), 0.0, [min(piece, tokens - at)], [k_active], [at]))
        return total

    def memory_bytes(self, tokens: float) -> float:
        """Predicted memory of an engine that holds keys and values of these many tokens."""
        return self.fixed_bytes + self.token_bytes * tokens

    def require(self, *, engine: str, machine: str, checkpoint: str) -> None:
        """Raise PrismError where it was measured on another engine, machine or checkpoint."""
        wanted = {"engine": engine, "machine": machine, "checkpoint": checkpoint}
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise PrismError(
                    f"the cost model was measured for {name} {getattr(self, name)!r}, this is {value!r}; "
                    "measure here with `moe-prism profile-cost`"
                )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        record["coefficients"] = dict(zip(TERMS, self.coefficients, strict=True))
        steps = [{**m.load._asdict(), "seconds": m.seconds, "held_out": m.held_out} for m in self.measured]
        return {"version": VERSION, **record, "measured": steps}

    @staticmethod
    def from_dict(value: Any) -> CostModel:
        """The inverse; raises PrismError for another version or a damaged record."""
        if not isinstance(value, dict) or value.get("version") != VERSION:
            got = value.get("version") if isinstance(value, dict) else type(value).__name__
            raise PrismError(f"cost model version must be {VERSION}, got {got!r}; run `moe-prism profile-cost` again")
        record = {name: item for name, item in value.items() if name != "version"}
        try:
            if set(record["coefficients"]) != set(TERMS):
                raise KeyError(f"its terms are {', '.join(record['coefficients'])}")
            record["coefficients"] = tuple(float(record["coefficients"][name]) for name in TERMS)
            record["measured"] = tuple(_step(dict(step)) for step in record["measured"])
            return CostModel(**record)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, PrismError):
                raise
            raise PrismError(f"the cost model is damaged ({error}); run `moe-prism profile-cost` again") from None


def _step(record: dict[str, Any]) -> MeasuredStep:
    seconds, held_out = float(record.pop("seconds")), bool(record.pop("held_out"))
    return MeasuredStep(StepLoad(**{name: float(value) for name, value in record.items()}), seconds, held_out)


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

"""How long a step takes and what it holds: a few terms with non-negative coefficients, fitted once to measured steps.

A step computes pieces of prompts (P tokens in all) and a next token for each of D decoding requests; k_i is a token's
budget, F = k * N. Its time is the sum of ``TERMS``, each times its coefficient:

    step, several                       1; [P + D > 1]: one token alone takes faster ways
    prefill_step, decode_step           [P > 0]; [D > 0]
    prefill_tokens, prefill_work        P; sum over prompt tokens of k_i / F
    prefill_first                       min(P, 256): larger products are faster
    prefill_context                     sum over prompt tokens of the tokens up to it, which attention reads
    decode_tokens, decode_work          D; sum over decoding requests of k_i / F
    touched                             expected share of all sub-experts that anybody uses: what a step reads
    context                             sum over decoding requests of their tokens so far
    gated                               whether anybody is below F
    gated_tokens                        P if any prompt is below F, and D if any decoding request is
    prefill_low, decode_low             sums of min(k_i / F, 1 / 4) over those same tokens

*touched* is 1 - product of (1 - k_i / (E N)), where decoding requests have at most the cap on different sub-experts. At
full budget for all no gate runs, hence *gated*; below it times bend, since a gate looks at more sub-experts than it
keeps: the first quarter of a budget costs more than the others. With equal budgets this is the paper's
C(batch, k_active) (arXiv 2510.19366, phase 2). Knows no engine: who measures is ``moe_prism.bench``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..errors import PrismError
from .step_load import LOW, TERMS, MeasuredStep, StepLoad

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


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
    """log of the share of sub-experts that one token of budget k leaves untouched, k = 0 .. F"""
    _prompt_token: Floats = field(init=False, repr=False, compare=False)
    """seconds of a prompt's token but for what it attends to, by budget"""
    _gated_token: Floats = field(init=False, repr=False, compare=False)
    """seconds of a decoding request but for its context, by budget, where somebody is below F"""

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
        c, share = self._by_name, np.arange(self.full_budget + 1) / self.full_budget
        low = np.minimum(share, LOW)
        prompt = c["prefill_tokens"] + c["prefill_first"] + c["prefill_work"] * share
        prompt[:-1] += (c["gated_tokens"] + c["prefill_low"] * low)[:-1]
        object.__setattr__(self, "_prompt_token", prompt)
        gated = c["decode_tokens"] + c["decode_work"] * share + c["gated_tokens"] + c["decode_low"] * low
        object.__setattr__(self, "_gated_token", gated)

    @classmethod
    def free(cls, full_budget: int, sub_experts: int) -> CostModel:
        """For an engine that was not measured: no time is ever short, so load and objectives move no budget."""
        return cls(tuple(1e-9 for _ in TERMS), full_budget, sub_experts)

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
        if len(p):
            untouched *= float(np.exp((p * self._log_untouched[q]).sum()))
        below = bool((k < self.full_budget).any()), bool((q < self.full_budget).any())
        low = np.minimum(k / self.full_budget, LOW).sum(), p @ np.minimum(q / self.full_budget, LOW)
        return StepLoad(
            float(p.sum()),
            float(p @ q) / self.full_budget if len(p) else 0.0,
            len(k),
            float(k.sum()) / self.full_budget,
            untouched,
            context if len(k) else 0.0,
            float((p * (start + (p + 1) / 2)).sum()),
            float(any(below)),
            below[0] * len(k) + below[1] * float(p.sum()),
            below[1] * float(low[1]),
            below[0] * float(low[0]),
        )

    def decode_curve(
        self, budgets: Ints, context: float = 0.0, touched: Floats | None = None, counts: Ints | None = None
    ) -> Floats:
        """Seconds that decoding adds to a step; the first of ``decode_curves``."""
        return self.decode_curves(budgets, context, touched, counts)[0]

    def decode_curves(
        self, budgets: Ints, context: float = 0.0, touched: Floats | None = None, counts: Ints | None = None
    ) -> tuple[Floats, Floats]:
        """Seconds that decoding adds to a step, for several choices of budgets at once.

        Args:
            budgets: ``[X, D]``.
            context: sum of the requests' tokens so far.
            touched: share of sub-experts that each choice touches, ``[X]``; None: what the budgets touch.
            counts: how many requests each of the D budgets stands for, ``[D]``; None: one.

        Returns:
            ``[X]`` of a step that only decodes, and of one with prompts in it, in which what ``step_overhead`` counts
            for them is not counted again; all zero where D = 0.
        """
        weights = np.ones(budgets.shape[1], dtype=np.int64) if counts is None else counts
        batch = int(weights.sum())
        if not batch:
            return np.zeros(len(budgets)), np.zeros(len(budgets))
        c = self._by_name
        below = (budgets < self.full_budget).any(axis=1)
        full = batch * (c["decode_tokens"] + c["decode_work"])
        each = np.where(below, _weighted(self._gated_token[budgets], weights), full)
        beside: Floats = c["decode_step"] + c["context"] * context + each
        shares = self.touched(budgets, weights) if touched is None else touched
        alone = beside + c["several"] * (batch > 1) + c["touched"] * shares + c["gated"] * below
        return alone, beside

    def decode_growth(self, budgets: Ints, context: Floats) -> Floats:
        """Seconds that decoding adds to a step for the first r of these requests, ``[R]``, r = 1 .. R.

        Args:
            budgets: ``[R]``.
            context: tokens of each so far, ``[R]``.
        """
        c = self._by_name
        below = np.maximum.accumulate(budgets < self.full_budget)
        full = (c["decode_tokens"] + c["decode_work"]) * np.arange(1, len(budgets) + 1)
        each = np.where(below, np.cumsum(self._gated_token[budgets]), full) + c["context"] * np.cumsum(context)
        untouched = np.exp(np.cumsum(self._log_untouched[budgets]))
        growth: Floats = c["decode_step"] + each + c["touched"] * (1.0 - untouched) + c["gated"] * below
        growth[1:] += c["several"]
        return growth

    def touched(self, budgets: Ints, counts: Ints | None = None) -> Floats:
        """Expected share of a layer's sub-experts that decoding requests use, ``[X]``; see ``decode_curve``."""
        logs = self._log_untouched[budgets]
        share: Floats = 1.0 - np.exp(logs.sum(axis=1) if counts is None else _weighted(logs, counts))
        return share

    def prefill_curve(self, tokens: Floats, starts: Floats, budgets: Ints) -> Floats:
        """Seconds that each prompt adds to a step that computes all of it, without what a step with prompts costs once.

        As if each were among the first 256 tokens: it does not depend on the others.

        Args:
            tokens: of each piece, ``[Q]``.
            starts: tokens computed before it, ``[Q]``.
            budgets: ``[X, Q]``.

        Returns:
            ``[X, Q]``.
        """
        reads = self._by_name["prefill_context"] * (starts + (tokens + 1) / 2)
        curve: Floats = tokens * (reads + self._prompt_token[budgets])
        return curve

    def step_overhead(self, *, prompts: bool) -> float:
        """Seconds of a step before anything is computed; of one with prompts, every sub-expert and a gate are in it."""
        c = self._by_name
        return c["step"] + (c["several"] + c["prefill_step"] + c["touched"] + c["gated"]) * prompts

    def table(self, batch: int, k_active: int, context: float = 0.0) -> float:
        """C(batch, k_active): seconds of one decode step of equal budgets (arXiv 2510.19366, phase 2).

        Args:
            batch: requests, at least 1.
            k_active: budget of each.
            context: tokens that each has so far.
        """
        below, share = float(k_active < self.full_budget), k_active / self.full_budget
        untouched = (1.0 - k_active / self.sub_experts) ** batch
        return self.seconds(
            StepLoad(
                decode=batch,
                decode_work=batch * share,
                untouched=untouched,
                context=context * batch,
                gated=below,
                gated_tokens=below * batch,
                decode_low=below * batch * min(share, LOW),
            )
        )

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


def _weighted(values: Floats, weights: Ints) -> Floats:
    """Sums of rows ``[X, D]``; not by BLAS, which would wake threads that the engine's kernels use."""
    sums: Floats = np.einsum("xd,d->x", values, weights)
    return sums

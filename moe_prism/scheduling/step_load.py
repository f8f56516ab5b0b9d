"""What a step computes, in the terms that its time is a sum of (see ``cost_model``). Knows no times."""

from __future__ import annotations

from typing import NamedTuple

TERMS = (
    *("step", "several", "prefill_step", "decode_step"),
    *("prefill_tokens", "prefill_first", "prefill_low", "prefill_work", "prefill_context"),
    *("decode_tokens", "decode_low", "decode_work", "context"),
    *("touched", "gated", "gated_tokens"),
)
LOW = 0.25  # share of full budget up to which the terms of low budgets grow
FIRST = 256  # prompt tokens up to which the term of short prompts grows


class StepLoad(NamedTuple):
    """What a step computes.

    Attributes:
        prefill_tokens: P.
        prefill_work: sum over prompt tokens of budget / F.
        decode: D.
        decode_work: sum over decoding requests of budget / F.
        untouched: expected share of sub-experts that nobody uses.
        context: sum over decoding requests of their tokens so far.
        prefill_context: sum over prompt tokens of the tokens up to it.
        gated: 1 if anybody is below full budget, else 0.
        gated_tokens: tokens of the prompts and of the decoding requests, of either where anybody there is below it.
        prefill_low: sum over prompt tokens of min(budget / F, LOW), where any of them is below full budget.
        decode_low: the same of decoding requests.
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
    prefill_low: float = 0.0
    decode_low: float = 0.0

    def terms(self) -> tuple[float, ...]:
        """The values of ``TERMS``."""
        return (
            *(1.0, float(self.prefill_tokens + self.decode > 1)),
            *(float(self.prefill_tokens > 0), float(self.decode > 0)),
            *(self.prefill_tokens, min(self.prefill_tokens, FIRST)),
            *(self.prefill_low, self.prefill_work, self.prefill_context),
            *(self.decode, self.decode_low, self.decode_work, self.context),
            *(1.0 - self.untouched, self.gated, self.gated_tokens),
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

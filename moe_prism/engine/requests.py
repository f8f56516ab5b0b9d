"""What is asked of the engine and what it answers. Knows no model, no policy and no text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import PrismError
from ..scheduling import Request, StepPlan


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen.

    Attributes:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_p: only the most likely tokens whose probabilities add up to this share; 1: all.
        seed: of this request's draws, which depend on no other request; None: a new one each time.
        stop_token_ids: the first of these ends the request; it is still reported.
        logprobs: report the log-probability of each token, and this many most likely ones; None: neither.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None

    def check(self, vocabulary: int) -> None:
        """Raise PrismError for a value out of range."""
        if not 0 <= self.temperature < math.inf:
            raise PrismError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise PrismError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise PrismError(f"seed must be a whole number of 64 bits, got {self.seed}")
        if self.logprobs is not None and not 0 <= self.logprobs <= vocabulary:
            raise PrismError(f"logprobs must be from 0 to {vocabulary} (the vocabulary), got {self.logprobs}")
        check_tokens("stop_token_ids", self.stop_token_ids, vocabulary)


@dataclass(frozen=True)
class Generation:
    """A request with its tokens.

    Attributes:
        request: what policies see; its ``prompt_tokens`` is the length of ``prompt``, its arrival a time on the
            engine's clock.
        prompt: token ids.
        sampling: how tokens are chosen.
    """

    request: Request
    prompt: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)


class TokenEvent(NamedTuple):
    """One generated token.

    Attributes:
        id: of the request.
        token: its id.
        budget: sub-experts that it could run.
        logprob: natural logarithm of its probability before temperature and top_p, where it was asked for.
        top: the most likely (token, log-probability), most likely first, as many as were asked for.
        finished: "stop" or "length" with the last token, else None.
    """

    id: str
    token: int
    budget: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    finished: str | None


class FailedEvent(NamedTuple):
    """The request ended without an answer; ``error`` says why."""

    id: str
    error: str


@dataclass(frozen=True)
class EngineStats:
    """The engine between steps.

    Attributes:
        waiting, running: requests.
        budgets: of the last step, by request.
        tokens: generated so far.
        cache_use: share of the memory for keys and values that running requests have reserved.
        steps: so far.
        policy_seconds, model_seconds, seconds: spent on steps so far: on planning, on forward passes, in all.
        plan: of the last step.
    """

    waiting: int = 0
    running: int = 0
    budgets: Mapping[str, int] = field(default_factory=dict)
    tokens: int = 0
    cache_use: float = 0.0
    steps: int = 0
    policy_seconds: float = 0.0
    model_seconds: float = 0.0
    seconds: float = 0.0
    plan: StepPlan | None = None


def check_tokens(name: str, tokens: Sequence[int], vocabulary: int) -> None:
    """Raise PrismError for an id outside the vocabulary."""
    for token in tokens:
        if not 0 <= token < vocabulary:
            raise PrismError(f"{name}: token ids must be from 0 to {vocabulary - 1}, got {token}")

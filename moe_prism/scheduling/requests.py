"""What a scheduler knows of requests and of the engine, and what it answers.

An engine fills a ``State`` before every step and carries out the ``StepPlan``. Times are seconds on one clock, which
the caller chooses. Knows no engine, no texts and no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import PrismError


@dataclass(frozen=True)
class Request:
    """One request as it was asked for.

    Attributes:
        id: unique among the requests of an engine.
        arrival: when it came, in seconds.
        prompt_tokens: P, at least 1.
        max_tokens: tokens it may generate, at least 1.
        k_min: quality floor, the least sub-experts a token of it may run.
        k_active: the most it wants, at least ``k_min``.
        ttft_ms: wanted time to first token, or None.
        tpot_ms: wanted time per output token after the first, or None.
        priority: lower runs earlier.
        best_effort: no budget can meet its objectives; it runs at its floor and they bind nobody (see ``Admission``).
    """

    id: str
    arrival: float
    prompt_tokens: int
    max_tokens: int
    k_min: int
    k_active: int
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    priority: int = 0
    best_effort: bool = False

    @cached_property
    def packed(self) -> bytes:
        """``Columns`` as float64, kept: policies look at every waiting request before every step."""
        ttft, tpot = (math.nan if value is None else value / 1e3 for value in (self.ttft_ms, self.tpot_ms))
        row = (self.arrival, self.prompt_tokens, self.max_tokens, self.k_min, self.k_active, ttft, tpot, self.priority)
        return np.array([*row, self.best_effort], dtype=np.float64).tobytes()

    def check(self, full_budget: int) -> None:
        """Raise PrismError for a value that no engine of this full budget can serve."""
        if not math.isfinite(self.arrival):
            raise PrismError(f"request {self.id}: arrival must be a time in seconds, got {self.arrival}")
        if self.prompt_tokens < 1:
            raise PrismError(f"request {self.id}: prompt_tokens must be 1 or more, got {self.prompt_tokens}")
        if self.max_tokens < 1:
            raise PrismError(f"request {self.id}: max_tokens must be 1 or more, got {self.max_tokens}")
        if not 1 <= self.k_min <= full_budget:
            raise PrismError(
                f"request {self.id}: k_min must be from 1 to {full_budget} (full budget), got {self.k_min}"
            )
        if not self.k_min <= self.k_active <= full_budget:
            raise PrismError(
                f"request {self.id}: k_active must be from k_min = {self.k_min} to {full_budget} (full budget), "
                f"got {self.k_active}"
            )
        for name in ("ttft_ms", "tpot_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise PrismError(
                    f"request {self.id}: {name} must be above 0 milliseconds, got {value}; or leave it out"
                )


_packed = attrgetter("packed")


class Columns(NamedTuple):
    """Requests as arrays ``[R]`` of float64; objectives in seconds, NaN where there is none."""

    arrival: NDArray[np.float64]
    prompt_tokens: NDArray[np.float64]
    max_tokens: NDArray[np.float64]
    k_min: NDArray[np.float64]
    k_active: NDArray[np.float64]
    ttft: NDArray[np.float64]
    tpot: NDArray[np.float64]
    priority: NDArray[np.float64]
    best_effort: NDArray[np.float64]

    @staticmethod
    def rows(requests: Iterable[Request]) -> NDArray[np.float64]:
        """All columns as one array ``[R, 9]``, requests in their order; read-only."""
        return np.frombuffer(b"".join(map(_packed, requests))).reshape(-1, len(Columns._fields))

    @classmethod
    def of(cls, requests: Iterable[Request]) -> Columns:
        """From requests, in their order."""
        return cls(*cls.rows(requests).T)


class Running(NamedTuple):
    """An admitted request that is not finished.

    Attributes:
        request: what was asked for.
        prefilled: prompt tokens whose keys and values are computed.
        generated: tokens it has; at least 1 once the whole prompt is prefilled.
        first_token: when the first one came, or None.
        budget: the budget of its last step, of its prompt or of a token; before the first, ``StepPlan.batch`` of the
            plan that admitted it.
    """

    request: Request
    prefilled: int = 0
    generated: int = 0
    first_token: float | None = None
    budget: int = 0

    @property
    def prefill_left(self) -> int:
        """Prompt tokens still to compute."""
        return self.request.prompt_tokens - self.prefilled


class Progress(NamedTuple):
    """How far running requests are, as arrays ``[R]`` of float64; see ``Running``. No first token is NaN."""

    prefilled: NDArray[np.float64]
    generated: NDArray[np.float64]
    first_token: NDArray[np.float64]
    budget: NDArray[np.float64]

    @classmethod
    def of(cls, running: Sequence[Running]) -> tuple[Sequence[Request], Progress]:
        """What was asked for and how far it is, of requests in their order."""
        asked, *columns = list(zip(*running, strict=True)) or [()] * 5
        return asked, cls(*(np.array(column, dtype=np.float64) for column in columns))

    def only(self, which: NDArray[np.bool_]) -> Progress:
        """Some of them."""
        return Progress(*(column[which] for column in self))


@dataclass(frozen=True)
class Limits:
    """What an engine can hold.

    Attributes:
        full_budget: k * N.
        max_running: requests that run at once (B_max of arXiv 2510.19366).
        memory_tokens: tokens of prompt and output that fit, reserved at admission; None: no limit.
        max_prefill: prompt tokens of one step; longer prompts are computed in pieces. None: whole prompts.
    """

    full_budget: int
    max_running: int
    memory_tokens: int | None = None
    max_prefill: int | None = None

    def __post_init__(self) -> None:
        for name in ("full_budget", "max_running", "memory_tokens", "max_prefill"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PrismError(f"{name} must be 1 or more, got {value}")

    def check(self, request: Request) -> None:
        """Raise PrismError for a request that could never run here."""
        request.check(self.full_budget)
        if self.memory_tokens is not None and memory_of(request) > self.memory_tokens:
            raise PrismError(
                f"request {request.id} needs memory for {memory_of(request)} tokens (prompt and max_tokens), the "
                f"engine has {self.memory_tokens}; shorten it or lower max_tokens"
            )


@dataclass(frozen=True)
class State:
    """The engine before a step.

    Attributes:
        waiting: not yet admitted, in order of arrival.
        running: admitted, in order of admission.
        limits: what the engine can hold.
        admitted: how many requests it has admitted so far; it decides whose turn it is.
    """

    waiting: Sequence[Request]
    running: Sequence[Running]
    limits: Limits
    admitted: int = 0


@dataclass(frozen=True)
class StepPlan:
    """What the engine does in its next step.

    Attributes:
        admit: ids of waiting requests that start to run, in this order.
        budgets: id -> budget of every request that takes part, admitted ones included: its prompt tokens of this
            step if it has any left, else its next token.
        prefill: id -> prompt tokens of this step, of requests that have any left; one that is not named computes
            none in this step.
        batch: what admitted requests remember as their budget until their first step, which may be later; 0: nothing.
        cap: different sub-experts that a layer may load for the decoding requests of this step, their floors first
            (batch-aware selection); None: everyone runs its own best.
        wake: if nothing runs, when to ask again at the latest; None: when a request comes.
    """

    admit: tuple[str, ...] = ()
    budgets: Mapping[str, int] = field(default_factory=dict)
    prefill: Mapping[str, int] = field(default_factory=dict)
    batch: int = 0
    cap: int | None = None
    wake: float | None = None


def memory_of(request: Request) -> int:
    """Tokens reserved for a request at admission."""
    return request.prompt_tokens + request.max_tokens

"""Our policy: every step decides whom to admit and what each request's budget is.

Requests join and leave between steps. The step's time limit comes from the objectives of those that decode; admission
and budgets are chosen so that the predicted time of the step stays within it:

1. *Admit* by priority, then deadline, while places and memory last and the step fits with everyone at the floor.
   Whoever has waited ``patience`` seconds is admitted first, whatever the time, so nobody starves: see ``Continuous``.
2. *Prompts* get the highest excess over their floors that still fits with decoding at the floors; as do
3. *decoding* requests with the time that is left. One *excess* is shared: budget = min(wanted, floor + excess), so
   scarce time is taken from those farthest above their floors first.
4. While somebody waits who cannot be admitted, excess is spent only as far as the wait allows: those who run then
   finish sooner. With nobody waiting, spare time is spent on quality.
5. An excess falls at once and rises slowly, from the budgets of the step before, so that budgets do not flap.

Knows no engine, and nothing of how a step's time comes about but the cost model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..cost_model import StepLoad
from ..requests import Request, Running, State, StepPlan, memory_of
from .base import POLICIES, Policy, memory_left, positive, prefill_pieces

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Decoding:
    """Requests that decode, as arrays ``[D]``."""

    floor: Ints
    wanted: Ints
    before: Ints
    context: float

    @classmethod
    def of(cls, running: list[Running]) -> _Decoding:
        """Those whose prompt is done."""
        return cls(
            np.array([r.request.k_min for r in running], dtype=np.int64),
            np.array([r.request.k_active for r in running], dtype=np.int64),
            np.array([r.budget for r in running], dtype=np.int64),
            float(sum(r.request.prompt_tokens + r.generated for r in running)),
        )

    def at(self, excess: int) -> Ints:
        """Budgets."""
        return np.minimum(self.wanted, self.floor + excess)


@dataclass(frozen=True)
class _Prompts:
    """Pieces of prompts of a step, as arrays ``[Q]``."""

    names: list[str]
    tokens: Ints
    floor: Ints
    wanted: Ints

    @classmethod
    def of(cls, requests: dict[str, Request], pieces: dict[str, int]) -> _Prompts:
        """From a step's pieces."""
        chosen = [requests[name] for name in pieces]
        return cls(
            list(pieces),
            np.array(list(pieces.values()), dtype=np.int64),
            np.array([r.k_min for r in chosen], dtype=np.int64),
            np.array([r.k_active for r in chosen], dtype=np.int64),
        )

    def at(self, excess: int) -> Ints:
        """Budgets."""
        return np.minimum(self.wanted, self.floor + excess)


@POLICIES.register("continuous")
@dataclass(frozen=True)
class Continuous(Policy):
    """Iteration-level batching with elastic budgets.

    The bound on waiting: requests that have waited ``patience`` seconds are admitted in order of arrival before all
    others and whatever the predicted time. So once a request has waited so long, it starts as soon as the requests
    that came before it have started and enough places and memory are free for it.

    Attributes:
        ttft_ms: wanted time to first token of requests that name none.
        tpot_ms: wanted time per output token of requests that name none.
        margin: share of an objective that predicted times may fill.
        patience: seconds.
        rise: the most sub-experts that budgets rise in one step.
    """

    ttft_ms: float = 1000.0
    tpot_ms: float = 100.0
    margin: float = 0.9
    patience: float = 10.0
    rise: int = 1

    def __post_init__(self) -> None:
        positive(ttft_ms=self.ttft_ms, tpot_ms=self.tpot_ms, margin=self.margin, patience=self.patience, rise=self.rise)

    def plan(self, state: State, now: float) -> StepPlan:
        """See ``Policy.plan``."""
        decoding = [r for r in state.running if not r.prefill_left]
        steady = _Decoding.of(decoding)
        limit = self._limit(state, decoding, now)
        admitted = self._admit(state, steady, limit, now)
        requests = {r.request.id: r.request for r in state.running if r.prefill_left}
        pending = [(r.request.id, r.prefill_left) for r in state.running if r.prefill_left]
        for request in admitted:
            requests[request.id] = request
            pending.append((request.id, request.prompt_tokens))
        prompts = _Prompts.of(requests, prefill_pieces(pending, state.limits))
        most = state.limits.full_budget
        held = len(state.waiting) > len(admitted)
        if held:
            limit = min(limit, self._until_due(state, admitted, decoding, now))
        for_prompts = _largest(most, lambda x: self.cost.seconds(self._load(steady, 0, prompts, x)) <= limit)
        if not len(prompts.names):
            for_prompts = 0
        excess = _largest(most, lambda x: self.cost.seconds(self._load(steady, x, prompts, for_prompts)) <= limit)
        budgets = dict(zip(prompts.names, prompts.at(for_prompts).tolist(), strict=True))
        given = np.where(steady.before > 0, np.minimum(steady.at(excess), steady.before + self.rise), steady.at(excess))
        given = np.maximum(given, steady.floor)
        budgets.update(zip((r.request.id for r in decoding), given.tolist(), strict=True))
        pieces = dict(zip(prompts.names, prompts.tokens.tolist(), strict=True))
        return StepPlan(tuple(r.id for r in admitted), budgets, pieces)

    def _limit(self, state: State, decoding: list[Running], now: float) -> float:
        """Seconds that this step may take.

        A request's next token is due ``tpot`` after the one before, earlier delays and gains included; gains are
        lent for one step only in part, so that a long step does not use them up at once.
        """
        limit = float("inf")
        for r in decoding:
            each = (r.request.tpot_ms or self.tpot_ms) / 1e3
            start = now if r.first_token is None else r.first_token
            due = start + r.generated * each - now
            limit = min(limit, self.margin * min(max(due, 0.5 * each), 2 * each))
        for r in state.running:
            if r.prefill_left:  # its first token comes with the last piece
                limit = min(limit, max(self._first_token_due(r.request) - now, self.tpot_ms / 1e3))
        return limit

    def _first_token_due(self, request: Request) -> float:
        return request.arrival + self.margin * (request.ttft_ms or self.ttft_ms) / 1e3

    def _admit(self, state: State, steady: _Decoding, limit: float, now: float) -> list[Request]:
        """Who starts now, in order."""
        left, places = memory_left(state), state.limits.max_running - len(state.running)
        if not state.waiting or places < 1:
            return []
        most_tokens = float("inf") if state.limits.max_prefill is None else float(state.limits.max_prefill)
        tokens = float(sum(r.prefill_left for r in state.running))
        work = sum(r.prefill_left * r.request.k_min for r in state.running) / state.limits.full_budget
        base = self.cost.load(steady.at(0), steady.context)
        chosen: list[Request] = []
        for request in sorted(state.waiting, key=lambda r: self._order(r, now)):
            overdue = now - request.arrival >= self.patience
            if memory_of(request) > left or len(chosen) >= places:
                if overdue:
                    break  # nobody overtakes who has waited too long
                if len(chosen) >= places:
                    break
                continue
            if tokens >= most_tokens:
                break  # its prompt could not start in this step
            more = tokens + request.prompt_tokens
            more_work = work + request.prompt_tokens * request.k_min / state.limits.full_budget
            cut = min(1.0, most_tokens / more)
            load = StepLoad(more * cut, more_work * cut, base.decode, base.decode_work, base.untouched, base.context)
            first = not chosen and not state.running
            if not (first or overdue) and self.cost.seconds(load) > self._with_prompt(request, limit, now):
                break
            chosen.append(request)
            left -= memory_of(request)
            tokens, work = more, more_work
        return chosen

    def _order(self, request: Request, now: float) -> tuple[int, int, float]:
        if now - request.arrival >= self.patience:
            return 0, 0, request.arrival
        return 1, request.priority, self._first_token_due(request)

    def _with_prompt(self, request: Request, limit: float, now: float) -> float:
        """Time of a step that a prompt joins: nobody decodes, so its own objective counts; else the step's limit."""
        if limit < float("inf"):
            return limit
        return max(self._first_token_due(request) - now, self.tpot_ms / 1e3)

    def _until_due(self, state: State, admitted: list[Request], decoding: list[Running], now: float) -> float:
        """Time of this step that lets a place be free before the most urgent of those left waiting is due.

        The next place is free when the request with the fewest tokens left ends.
        """
        starting = {r.id for r in admitted}
        due = min(self._first_token_due(r) for r in state.waiting if r.id not in starting)
        left = min((r.request.max_tokens - r.generated for r in decoding), default=1)
        return max(due - now, 0.0) / max(1, left)

    def _load(self, steady: _Decoding, excess: int, prompts: _Prompts, for_prompts: int) -> StepLoad:
        return self.cost.load(steady.at(excess), steady.context, prompts.tokens, prompts.at(for_prompts))


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest x in 0 .. most that fits, where less always fits as well; 0 if none does."""
    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

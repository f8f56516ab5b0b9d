"""Our policy: every step decides whom to admit and what each request's budget is.

Requests join and leave between steps. A request's budget is its floor plus an *excess* that all share, up to what it
wants: so scarce time is taken from those farthest above their floors first. One excess is for prompts, one for
decoding. Times are predicted by the cost model:

1. *The step.* A token is due its objective after the one before; requests that are ahead of their schedule lend a part
   of it to a step with prompts in it.
2. *The line*: prompts that are begun, then waiting requests by ``Continuous.order``, as far as places and memory last
   and everyone, at the floor, keeps the pace. The prompts' excess is the largest with which the whole line has its
   first tokens in time; nobody decodes at a larger one meanwhile.
3. *Decoding* has the largest excess with which a step keeps the objectives. It falls at once, and rises slowly and only
   where there is room to spare. Both excesses fall as places or memory run out, before anybody has to wait for them.
4. *Pieces.* The line's prompts are computed in order, as many tokens as fit into the step beside the decoding; who gets
   none stays in the queue.

Knows no engine, and nothing of how a step's time comes about but the cost model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cost_model import Floats, Ints
from ..requests import Columns, Request, Running, State, StepPlan
from .base import POLICIES, Policy, memory_left, positive
from .queue import Order, in_turn, those_with_room

LEND = 2.0  # a step with prompts may take this many times a token's objective from requests that are ahead
HURRY = 0.5  # how far a request that is behind its schedule shortens the step, as a share of its objective
# running and waiting requests over those that there is room for: where excess begins to fall, and where none is left
CROWDED, FULL_HOUSE = 0.75, 1.25


class _Decoding(NamedTuple):
    """Those whose prompt is done, ``[D]``, and what they leave for a step.

    Attributes:
        requests: themselves.
        budgets: at every excess, ``[F, D]``.
        before: excess of the step before, None where there was none.
        steady: seconds of a step that keeps their pace; infinite where D = 0.
        lent: seconds of a step with prompts in it.
        curve: seconds that decoding adds to a step at every excess, ``[F]``.
        capped: the same if no more different sub-experts are loaded than the floors need, ``[F]``.
    """

    requests: list[Request]
    budgets: Ints
    before: int | None
    steady: float
    lent: float
    curve: Floats
    capped: Floats


class _Line(NamedTuple):
    """Prompts to compute, ``[Q]`` in the order in which they are computed.

    Attributes:
        names: their ids.
        tokens: left of each.
        starts: computed of each.
        due: seconds until the first token is due.
        budgets: at every excess, ``[F, Q]``.
    """

    names: list[str]
    tokens: Floats
    starts: Floats
    due: Floats
    budgets: Ints


@POLICIES.register("continuous")
@dataclass(frozen=True)
class Continuous(Policy):
    """Iteration-level batching with elastic budgets.

    The bound on waiting: of requests that have waited ``patience`` seconds, the oldest is the next but one to start at
    the latest, whatever the others' priorities and objectives; when it is its turn, nobody starts before there is room
    for it. So with n older ones of its kind a request starts after at most 2 n + 1 others have started, and prompts
    that have begun get at least ``piece`` tokens in every step.

    Attributes:
        ttft_ms: wanted time to first token of requests that name none.
        tpot_ms: wanted time per output token of requests that name none.
        margin: share of an objective that predicted times may fill.
        patience: seconds.
        calm: share of the time allowed within which an excess rises; between it and 1 nothing changes.
        rise: how much of full budget the budgets of decoding requests rise by in one step, at most.
        piece: the fewest prompt tokens of a step, as long as there are any.
        capped: where time is short, load fewer different sub-experts before budgets fall further (batch-aware
            selection). What that costs in quality is not among the measured operating points, so it is off.
    """

    ttft_ms: float = 1000.0
    tpot_ms: float = 100.0
    margin: float = 0.9
    patience: float = 10.0
    calm: float = 0.9
    rise: float = 0.1
    piece: int = 32
    capped: bool = False

    def __post_init__(self) -> None:
        positive(ttft_ms=self.ttft_ms, tpot_ms=self.tpot_ms, margin=self.margin, patience=self.patience)
        positive(calm=self.calm, rise=self.rise, piece=self.piece)

    def plan(self, state: State, now: float) -> StepPlan:
        """See ``Policy.plan``."""
        decoding = self._decoding([r for r in state.running if r.prefilled >= r.request.prompt_tokens], state, now)
        begun = [r for r in state.running if r.prefill_left]
        waiting = Columns.of(state.waiting)
        late = now - waiting.arrival >= self.patience
        fitting = those_with_room(self.order(waiting, now, state.admitted), waiting, late, state)
        fitting = self._in_pace(fitting, waiting, late, begun, decoding)
        line = self._line(begun, waiting, fitting, state, now)
        demand = _demand(state, waiting)
        for_prompts = min(self._for_prompts(line, decoding, 1.0), _uncrowded(demand, 1.0, state))
        excess, cap = self._for_decoding(line, decoding, demand, state)
        pieces = self._pieces(line, decoding, for_prompts, excess, state.limits.max_prefill)
        prefill = {name: tokens for name, tokens in zip(line.names, pieces, strict=True) if tokens}
        budgets = {
            name: k
            for name, k in zip(line.names, line.budgets[for_prompts].tolist(), strict=True)
            if name in prefill
        }  # fmt: skip
        budgets.update(zip((r.id for r in decoding.requests), decoding.budgets[excess].tolist(), strict=True))
        admit = tuple(name for name in line.names[len(begun) :] if name in prefill)
        return StepPlan(admit, budgets, prefill, cap)

    def order(self, waiting: Columns, now: float, admitted: int = 0) -> Order:
        """Indices of waiting requests, the next one first.

        By priority; of equal ones those that can still have their first token in time, then by when it is due. Those
        that have waited ``patience`` seconds are every second one, in order of arrival, as long as there are any.

        Args:
            waiting: requests, ``[W]``.
            now: in seconds.
            admitted: requests admitted so far; after an even number it is the turn of those who have waited.
        """
        due = self._due(waiting)
        regular = np.lexsort((waiting.arrival, due, due < now, waiting.priority))
        return in_turn(regular, waiting.arrival, now - waiting.arrival >= self.patience, admitted)

    def bounds(self, columns: Columns, full_budget: int) -> tuple[Floats, Floats]:
        """Least and most budget of each request, ``[R]``."""
        return columns.k_min, columns.k_active

    def _due(self, columns: Columns) -> Floats:
        """When first tokens should come; infinite where the objective binds nobody."""
        ttft = np.where(np.isnan(columns.ttft), self.ttft_ms / 1e3, columns.ttft)
        ttft[columns.best_effort > 0] = math.inf
        due: Floats = columns.arrival + self.margin * ttft
        return due

    def _each(self, columns: Columns) -> Floats:
        """Seconds that a token after the first may take; infinite where the objective binds nobody."""
        each = np.where(np.isnan(columns.tpot), self.tpot_ms / 1e3, columns.tpot)
        each[columns.best_effort > 0] = math.inf
        return each

    def _budgets(self, columns: Columns, full_budget: int) -> Ints:
        """At every excess, ``[F, R]``."""
        floor, most = self.bounds(columns, full_budget)
        return np.minimum(most, floor + np.arange(full_budget)[:, None]).astype(np.int64)

    def _decoding(self, running: list[Running], state: State, now: float) -> _Decoding:
        columns = Columns.of(r.request for r in running)
        budgets = self._budgets(columns, state.limits.full_budget)
        generated = np.array([r.generated for r in running], dtype=float)
        context = float(columns.prompt_tokens.sum() + generated.sum())
        curve = self.cost.decode_curve(budgets, context)
        capped = curve
        if self.capped and running:
            capped = self.cost.decode_curve(budgets, context, np.full(len(budgets), self.cost.touched(budgets[:1])[0]))
        first = np.array([now if r.first_token is None else r.first_token for r in running])
        each = self._each(columns)
        with np.errstate(invalid="ignore"):
            ahead = np.where(np.isinf(each), math.inf, first + generated * each - now)
        behind = np.maximum(ahead, HURRY * each)
        return _Decoding(
            [r.request for r in running],
            budgets,
            _before(running, budgets),
            self.margin * float(np.minimum(behind, each).min(initial=math.inf)),
            self.margin * float(np.minimum(behind, LEND * each).min(initial=math.inf)),
            curve,
            capped,
        )

    def _line(self, begun: list[Running], waiting: Columns, fitting: Order, state: State, now: float) -> _Line:
        first = Columns.of(r.request for r in begun)
        columns = Columns(*(np.concatenate([a, b[fitting]]) for a, b in zip(first, waiting, strict=True)))
        starts = np.zeros(len(columns.arrival))
        starts[: len(begun)] = [r.prefilled for r in begun]
        return _Line(
            [r.request.id for r in begun] + [state.waiting[i].id for i in fitting.tolist()],
            columns.prompt_tokens - starts,
            starts,
            self._due(columns) - now,
            self._budgets(columns, state.limits.full_budget),
        )

    def _for_prompts(self, line: _Line, decoding: _Decoding, ease: float) -> int:
        """The largest excess with which the whole line is in time; ``ease`` is the share of the time it may take."""
        most = len(line.budgets) - 1
        if not line.names:
            return most
        work = np.cumsum(self.cost.prefill_curve(line.tokens, line.starts, line.budgets), axis=1)
        overhead = self.cost.step_overhead(prompts=True)
        if decoding.requests:  # they take their part of every step
            share = 1.0 - (overhead + decoding.capped) / decoding.steady
            times = work / np.maximum(share, 1e-9)[:, None]
        else:
            times = work + overhead
        return _largest((times <= ease * line.due).all(axis=1), work[:, -1])

    def _in_pace(
        self, fitting: Order, waiting: Columns, late: NDArray[np.bool_], begun: list[Running], decoding: _Decoding
    ) -> Order:
        """As many as can decode at their floors, with all who run, and keep everyone's pace; late ones anyway."""
        running = Columns.of([*(r.request for r in begun), *decoding.requests])
        first = len(running.arrival)
        columns = Columns(*(np.concatenate([a, b[fitting]]) for a, b in zip(running, waiting, strict=True)))
        if len(columns.arrival) < 2:
            return fitting  # whoever is alone may run
        floor, _ = self.bounds(columns, self.cost.full_budget)
        seconds = self.cost.decode_growth(floor.astype(np.int64), columns.prompt_tokens)
        pace = self.margin * np.minimum.accumulate(self._each(columns))
        kept = (seconds + self.cost.step_overhead(prompts=False) <= pace)[first:]
        kept[: 1 - min(first, 1)] = True
        return fitting[np.logical_and.accumulate(kept) | late[fitting]]

    def _for_decoding(self, line: _Line, decoding: _Decoding, demand: float, state: State) -> tuple[int, int | None]:
        """Excess of decoding requests, and a cap on different sub-experts if there is to be one."""
        if not decoding.requests:
            return 0, None
        overhead = self.cost.step_overhead(prompts=False)
        limit = decoding.steady

        def most(ease: float) -> int:
            fits = decoding.capped <= ease * limit - overhead
            uncrowded = _uncrowded(demand, ease, state)
            return min(_largest(fits, decoding.capped), self._for_prompts(line, decoding, ease), uncrowded)

        excess = most(1.0)
        before = decoding.before
        if before is not None and excess > before:
            step = max(1, round(self.rise * len(decoding.budgets)))
            excess = min(before + step, max(before, most(self.calm)))
        more = float(decoding.curve[excess] - decoding.capped[excess])
        spare = limit - overhead - float(decoding.capped[excess])
        if more <= max(spare, 0.0):
            return excess, None
        least, wanted = self.cost.touched(decoding.budgets[[0, excess]])
        return excess, math.ceil(self.cost.sub_experts * (least + (wanted - least) * max(spare, 0.0) / more))

    def _pieces(
        self, line: _Line, decoding: _Decoding, for_prompts: int, excess: int, max_prefill: int | None
    ) -> list[int]:
        """Prompt tokens of this step, ``[Q]``."""
        if not line.names:
            return []
        budgets = line.budgets[for_prompts : for_prompts + 1]
        seconds = self.cost.prefill_curve(line.tokens, line.starts, budgets)[0]
        room = self.cost.step_overhead(prompts=True)
        if decoding.requests:
            room = decoding.lent - room - float(decoding.curve[excess])
            least = min(float(self.piece), float(line.tokens.sum()))
        else:
            room = LEND * self.tpot_ms / 1e3 - room
            least = float(line.tokens[0])  # nobody waits for a token, so nothing is gained by cutting it
        done = np.cumsum(seconds)
        part = np.clip((room - (done - seconds)) / seconds, 0.0, 1.0)
        tokens = np.floor(part * line.tokens)
        tokens[(part < 1.0) & (tokens < self.piece)] = 0.0
        if tokens.sum() < least:
            tokens = _first(line.tokens, least)
        if max_prefill is not None and tokens.sum() > max_prefill:
            tokens = _first(tokens, max_prefill)
        return [int(count) for count in tokens.tolist()]


def _first(tokens: Floats, most: float) -> Floats:
    """The first ``most`` of tokens in a row, by request."""
    taken: Floats = np.clip(most - (np.cumsum(tokens) - tokens), 0.0, tokens)
    return taken


def _largest(fits: Any, seconds: Floats) -> int:
    """The largest excess that fits; if none does the fastest, which is not 0 where a gate costs more than it saves."""
    found = np.flatnonzero(fits)
    return int(found[-1] if len(found) else np.argmin(seconds))


def _demand(state: State, waiting: Columns) -> float:
    """Requests that run or wait, over those that there is room for, by places or by memory."""
    limits = state.limits
    demand = (len(state.running) + len(state.waiting)) / limits.max_running
    if limits.memory_tokens is not None:
        wanted = float((waiting.prompt_tokens + waiting.max_tokens).sum())
        demand = max(demand, 1.0 + (wanted - memory_left(state)) / limits.memory_tokens)
    return demand


def _uncrowded(demand: float, ease: float, state: State) -> int:
    """The largest excess at a demand: all of it until places run short, none where too many wait for one.

    A place for one request is never short.
    """
    begins = max(CROWDED, 1.0 / state.limits.max_running)
    share = (ease * FULL_HOUSE - demand) / (FULL_HOUSE - begins)
    return int((state.limits.full_budget - 1) * min(1.0, max(0.0, share)) + 1e-9)


def _before(running: list[Running], budgets: Ints) -> int | None:
    """The excess of the step before; None where nobody decoded."""
    last = np.array([r.budget if r.generated > 1 else -1 for r in running])
    decoded = last > 0
    if not decoded.any():
        return None
    open_ended = decoded & (last < budgets[-1])
    if not open_ended.any():
        return len(budgets) - 1
    return max(0, int((last - budgets[0])[open_ended].min()))

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
   where there is room to spare. Both excesses fall as places or memory run out, before anybody has to wait for them. No
   excess is given up that would have bought less than a hundredth of a step.
4. *Pieces.* The line's prompts are computed in order, as many tokens as fit into the step beside the decoding; who gets
   none stays in the queue.

Knows no engine, and nothing of how a step's time comes about but the cost model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import compress
from operator import attrgetter

import numpy as np

from ..cost_model import Floats, Ints
from ..requests import Columns, Progress, Running, State, StepPlan
from .base import POLICIES, Policy, positive
from .decoding import Decoding, curves, excess_before
from .excess import as_good, demand, largest, uncrowded
from .line import Line
from .queue import Order, in_turn, those_with_room

LEND = 2.0  # a step with prompts may take this many times a token's objective from requests that are ahead
HURRY = 0.5  # how far a request that is behind its schedule shortens the step, as a share of its objective


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
        full, (asked, progress) = state.limits.full_budget, Progress.of(state.running)
        everyone = Columns.rows(asked)
        decodes = progress.prefilled >= Columns(*everyone.T).prompt_tokens
        names = list(compress(map(attrgetter("id"), asked), decodes))
        decoding = self._decoding(names, Columns(*everyone[decodes].T), progress.only(decodes), full, now)
        begun = list(compress(state.running, ~decodes))
        waiting = np.asfortranarray(Columns.rows(state.waiting))  # whole columns are read
        fitting = self._fitting(everyone, waiting, decoding, state, now)
        names = [r.request.id for r in begun] + [state.waiting[i].id for i in fitting.tolist()]
        line = self._line(names, np.concatenate([everyone[~decodes], waiting[fitting]]), begun, decoding, full, now)
        wanted, in_time = demand(state, Columns(*waiting.T)), line.largest(1.0)
        for_prompts = line.as_good(min(in_time, uncrowded(wanted, 1.0, state)))
        excess, cap = self._for_decoding(line, in_time, decoding, wanted, state)
        pieces = self._pieces(line, decoding, for_prompts, excess, state.limits.max_prefill)
        prefill = {name: tokens for name, tokens in zip(names, pieces, strict=True) if tokens}
        given = dict(zip(names, line.budgets[for_prompts].tolist(), strict=True))
        budgets = {name: given[name] for name in prefill}
        budgets.update(zip(decoding.names, decoding.budgets(excess).tolist(), strict=True))
        return StepPlan(tuple(name for name in names[len(begun) :] if name in prefill), budgets, prefill, cap=cap)

    def order(self, waiting: Columns, decoding: Decoding, state: State, now: float) -> Order:
        """Indices of waiting requests, the next one first.

        By priority; of equal ones those that can still have their first token in time, then by when it is due. Those
        that have waited ``patience`` seconds are every second one, in order of arrival, as long as there are any.
        """
        due = self._due(waiting)
        floor, _ = self.bounds(waiting, state.limits.full_budget)
        least = self.cost.prefill_curve(waiting.prompt_tokens, np.zeros(len(due)), floor[None].astype(np.int64))[0]
        missed = now + self._beside(least, decoding, 0) > due
        regular = np.lexsort((due, 2 * waiting.priority + missed))  # stable, and they come in order of arrival
        return in_turn(regular, waiting.arrival, now - waiting.arrival >= self.patience, state.admitted)

    def _beside(self, seconds: Floats, decoding: Decoding, excess: int | slice) -> Floats:
        """How long prompts take that would take so long alone: decoding takes its part of every step."""
        overhead = self.cost.step_overhead(prompts=True)
        if not decoding.names:
            return seconds + overhead
        share = np.maximum(1.0 - (overhead + decoding.beside[excess]) / decoding.steady, 1e-9)
        return seconds / (share[:, None] if isinstance(excess, slice) else share)

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
        excess = np.arange(full_budget)[:, None]
        budgets: Ints = np.minimum(most.astype(np.int64), floor.astype(np.int64) + excess)
        return budgets

    def _decoding(
        self, names: list[str], columns: Columns, progress: Progress, full_budget: int, now: float
    ) -> Decoding:
        floor, most = (bound.astype(np.int64) for bound in self.bounds(columns, full_budget))
        context = float(columns.prompt_tokens.sum() + progress.generated.sum())
        first = np.where(np.isnan(progress.first_token), now, progress.first_token)
        each = self._each(columns)
        ahead = np.maximum(first + progress.generated * each - now, HURRY * each)
        last = np.where(progress.generated > 1, progress.budget, 0).astype(np.int64)  # a prompt's budget says nothing
        return Decoding(
            names,
            floor,
            most,
            excess_before(last, floor, most, full_budget),
            self.margin * float(np.minimum(ahead, each).min(initial=math.inf)),
            self.margin * float(np.minimum(ahead, LEND * each).min(initial=math.inf)),
            *curves(self.cost, floor, most, context, capped=self.capped),
        )

    def _fitting(self, everyone: Floats, waiting: Floats, decoding: Decoding, state: State, now: float) -> Order:
        """Those of the waiting requests for whom there is room, and time for a step with all at their floors.

        Late ones count on no time.
        """
        if not len(waiting) or len(state.running) >= state.limits.max_running:
            return np.empty(0, dtype=np.intp)
        columns = Columns(*waiting.T)
        late = now - columns.arrival >= self.patience
        fitting = those_with_room(self.order(columns, decoding, state, now), columns, late, state)
        columns = Columns(*np.concatenate([everyone, waiting[fitting]]).T)
        floor, _ = self.bounds(columns, state.limits.full_budget)
        seconds = self.cost.decode_growth(floor.astype(np.int64), columns.prompt_tokens)
        pace = self.margin * np.minimum.accumulate(self._each(columns))
        kept = seconds + self.cost.step_overhead(prompts=False) <= pace
        kept[:1] = True  # whoever is alone may run
        return fitting[np.logical_and.accumulate(kept[len(everyone) :]) | late[fitting]]

    def _line(
        self, names: list[str], rows: Floats, begun: list[Running], decoding: Decoding, full_budget: int, now: float
    ) -> Line:
        columns = Columns(*rows.T)
        starts = np.zeros(len(rows))
        starts[: len(begun)] = [r.prefilled for r in begun]
        tokens = columns.prompt_tokens - starts
        budgets = self._budgets(columns, full_budget)
        work = np.cumsum(self.cost.prefill_curve(tokens, starts, budgets), axis=1)
        times = self._beside(work, decoding, slice(None))
        return Line(names, tokens, starts, budgets, self._due(columns) - now, times)

    def _for_decoding(
        self, line: Line, in_time: int, decoding: Decoding, wanted: float, state: State
    ) -> tuple[int, int | None]:
        """Excess of decoding requests, and a cap on different sub-experts if there is to be one.

        ``in_time`` is the largest with which the line is in time.
        """
        if not decoding.names:
            return 0, None
        overhead = self.cost.step_overhead(prompts=False)
        limit, seconds = decoding.steady, overhead + decoding.capped

        def most(ease: float, in_time: int) -> int:
            fitting = largest(seconds <= ease * limit, seconds)
            excess = min(fitting, in_time, uncrowded(wanted, ease, state))
            return max(excess, min(fitting, as_good(excess, seconds)))

        excess = most(1.0, in_time)
        before = decoding.before
        if before is not None and excess > before:
            step = max(1, round(self.rise * len(decoding.curve)))
            excess = min(before + step, max(before, most(self.calm, line.largest(self.calm))))
        more = float(decoding.curve[excess] - decoding.capped[excess])
        spare = limit - overhead - float(decoding.capped[excess])
        if more <= max(spare, 0.0):
            return excess, None
        least, all_of_it = self.cost.touched(np.stack([decoding.budgets(0), decoding.budgets(excess)]))
        return excess, math.ceil(self.cost.sub_experts * (least + (all_of_it - least) * max(spare, 0.0) / more))

    def _pieces(
        self, line: Line, decoding: Decoding, for_prompts: int, excess: int, max_prefill: int | None
    ) -> list[int]:
        """Prompt tokens of this step, ``[Q]``."""
        if not line.names:
            return []
        room = self.cost.step_overhead(prompts=True)
        if decoding.names:
            room = decoding.lent - room - float(decoding.beside[excess])
            least = min(float(self.piece), float(line.tokens.sum()))
        else:
            room = LEND * self.tpot_ms / 1e3 - room
            least = float(line.tokens[0])  # nobody waits for a token, so nothing is gained by cutting it
        return line.pieces(self.cost, for_prompts, room, least, self.piece, max_prefill)

"""The dial of one model: how many sub-experts its tokens may run, now.

One object is shared by all layers of a model. Knows nothing of scores or weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import PrismError
from .plan import Plan
from .sharing import Sharing

FULL = "full"
# Largest rise of perplexity of the named operating points; the smallest measured budget within it is taken.
NAMED_RISES = {"high": 0.01, "medium": 0.05, "low": 0.15}

Budget = int | float | str


class StepBudgets(NamedTuple):
    """Budgets of the tokens of one step.

    Attributes:
        k_active: int64 ``[T]``, the most sub-experts each token may run.
        k_min: int64 ``[T]``, what each token gets at least, or None for plain selection: every token runs
            its own best ``k_active``.
        cap: different sub-experts that a layer may touch in the step, or None.
        pairs: sum of ``k_active``, known to the host without asking a device.
        means: float64 ``[T]`` on the CPU, the budgets that the tokens of ``requests`` are to share; ``k_active`` is
            then theirs rounded down.
        requests: int64 ``[T]`` on the CPU.
    """

    k_active: Tensor
    k_min: Tensor | None = None
    cap: int | None = None
    pairs: int | None = None
    means: Tensor | None = None
    requests: Tensor | None = None


class Limiter(Protocol):
    """Leaves out what is not worth its time."""

    floor: int

    def limits(self, tokens: int) -> bool:
        """Whether a step of so many tokens is limited."""

    def limit(self, layer: int, scores: Tensor, chosen: Tensor, floor: Tensor, index: Tensor) -> Tensor:
        """The candidates that run: all of ``floor``, and part of ``chosen``. All tensors are on the CPU.

        Args:
            layer: its number.
            scores: ``[T, k, N]``, what candidates are compared by.
            chosen: bool ``[T, k, N]``, the budget.
            floor: bool ``[T, k, N]``, the limiter's ``floor`` best of each token.
            index: int64 ``[T, k]`` routed experts.
        """


class Dial:
    """The budgets in force.

    Attributes:
        full_budget: k * N; at it the model takes its own path.
        k_active: the budget of every token, 1..full_budget, where no other is set. It need not be whole where
            tokens share.
        rows: budgets of the rows of a batch, ``[B]``, or None.
        k_min: with it, selection looks at the whole batch (see ``set_budget``).
        cap: different sub-experts that a layer may touch in a step.
        executor: name of the executor, or "auto".
        points: named operating points -> budget, as far as any were measured.
        plan: how budgets are spent on neurons; None: on whole sub-experts.
        spread: the budget of every layer by budget, int64 ``[L, full + 1]``; None: the same in every layer.
        sharing: how tokens of a request share its budget, where it is known which are; None: all get the same.
        batch: rows and tokens of a row of the forward under way, where it is known; see ``begin``.
        limiter: what may run less than the budget, down to a floor of its own, because of time; None: nothing.
    """

    def __init__(self, full_budget: int) -> None:
        self.full_budget = full_budget
        self.k_active: int | float = full_budget
        self.rows: Tensor | None = None
        self.k_min: int | None = None
        self.cap: int | None = None
        self.executor = "auto"
        self.points: dict[str, int] = {FULL: full_budget}
        self.plan: Plan | None = None
        self.spread: Tensor | None = None
        self._placed: tuple[Tensor, Tensor] | None = None  # spread and its copy where budgets were last
        self.sharing: Sharing | None = None
        self.batch: tuple[int, int] | None = None
        self.limiter: Limiter | None = None
        self._buffer = torch.empty(0, dtype=torch.int64)
        self._filled: Tensor | None = None
        self._requests: Tensor | None = None
        self._floors: Tensor | None = None
        self._filled_cap: int | None = None
        # What the last layer asked for, which the next one wants again: budgets where all tokens have the same, those
        # of the filled buffer where all layers have the same, and what they are spent on.
        self._same: tuple[tuple[int, int, torch.device], Tensor] | None = None
        self._ready: tuple[tuple[object, ...], StepBudgets] | None = None
        self._spent: tuple[tuple[object, ...], tuple[StepBudgets, Tensor | None]] | None = None

    def check(self, k_active: object, name: str = "k_active") -> int:
        """``k_active`` itself; raises PrismError with its name if it is not a whole number in range."""
        if (
            isinstance(k_active, bool)
            or not isinstance(k_active, Integral)
            or not 1 <= int(k_active) <= self.full_budget
        ):
            raise PrismError(
                f"{name} must be a whole number from 1 to {self.full_budget} (full budget), got {k_active!r}"
            )
        return int(k_active)

    def resolve(self, value: Budget) -> int | float:
        """A budget from a whole number, a share in (0, 1] (a float) or the name of an operating point.

        A share is rounded down, but to one at least: a budget is a limit. Where tokens share, a budget is a mean: a
        share is taken as it is, and a float above 1 is a budget between two whole numbers.

        Raises:
            PrismError: out of range, or no point of that name was measured.
        """
        if isinstance(value, str):
            if value not in self.points:
                raise PrismError(
                    f"no operating point {value!r}; measured: {', '.join(sorted(self.points))}. "
                    "Measure with `moe-prism sweep`, or give a number"
                )
            return self.points[value]
        if isinstance(value, float):
            if self.sharing is not None and 0 < value <= self.full_budget:
                mean = max(1.0, value * self.full_budget if value <= 1 else value)
                return int(mean) if mean == int(mean) else mean
            if not 0 < value <= 1:
                raise PrismError(f"a share must be in (0, 1], got {value}; give budgets as whole numbers")
            return max(1, int(value * self.full_budget + 1e-9))
        return self.check(value)

    def fill(
        self,
        budgets: Sequence[float] | Tensor | None,
        requests: Sequence[int] | Tensor | None = None,
        *,
        floors: Tensor | None = None,
        cap: int | None = None,
    ) -> None:
        """Budgets of the next forward's tokens, until changed; None returns to ``k_active``.

        They are copied into one persistent buffer, which all layers read.

        Args:
            budgets: one per token, in the order of the flattened batch; a tensor must be on the CPU. Whole numbers,
                unless tokens share.
            requests: which request each token is of, as a small number of its own (see ``Sharing.open``); only tokens
                whose request is known share. Ignored where the checkpoint does not share.
            floors: int64 ``[T]`` on the CPU; with them, selection looks at the whole batch (see ``set_budget``), and
                this is what each token is sure of.
            cap: different sub-experts that a layer may touch; needs floors.

        Raises:
            PrismError: a value is out of range, or not whole.
        """
        self._ready = None
        if budgets is None:
            self._filled = self._floors = self._filled_cap = None
            return
        means = torch.as_tensor(budgets, dtype=torch.float64, device="cpu")
        values = means.long()
        sharing = self.sharing is not None and requests is not None
        if not sharing and not torch.equal(values.double(), means):
            raise PrismError(f"budgets must be whole numbers unless tokens share them, got {means.tolist()[:8]}")
        if len(values) and not 1 <= int(values.min()) <= int(values.max()) <= self.full_budget:
            bad = values[(values < 1) | (values > self.full_budget)][0]
            raise PrismError(f"k_active must be from 1 to {self.full_budget} (full budget), got {int(bad)}")
        if len(self._buffer) < len(values):
            self._buffer = torch.empty(len(values), dtype=torch.int64, device=self._buffer.device)
        self._buffer[: len(values)].copy_(values)
        self._filled = means if sharing else values.clone()
        self._requests = torch.as_tensor(requests, dtype=torch.int64, device="cpu") if sharing else None
        self._floors, self._filled_cap = floors, cap

    def begin(self, rows: int, tokens: int, fresh: bool) -> None:
        """A forward of a whole batch starts: its rows are the requests that share, unless ``fill`` named others.

        Args:
            rows: of the batch.
            tokens: of each row.
            fresh: whether they have no past, so that their accounts are empty.
        """
        self.batch = rows, tokens
        if fresh and self.sharing is not None and self._filled is None:
            self.sharing.open(torch.arange(rows))

    def of_layer(self, budgets: Tensor, layer: int) -> Tensor:
        """What budgets mean in a layer, in which there may be more or less to win than in others."""
        if self.spread is None:
            return budgets
        if budgets.device.type == "cpu":
            return self.spread[layer][budgets]
        if self._placed is None or self._placed[0] is not self.spread or self._placed[1].device != budgets.device:
            self._placed = self.spread, self.spread.to(budgets.device)
        return self._placed[1][layer][budgets]

    def step(self, tokens: int, device: torch.device, layer: int) -> StepBudgets | None:
        """Budgets of a layer for a forward of ``tokens`` tokens; None where all of them run everything.

        Raises:
            PrismError: the filled buffer or the rows do not fit the number of tokens.
        """
        if self._filled is not None:
            if len(self._filled) != tokens:
                raise PrismError(f"{len(self._filled)} budgets were filled in, but the step has {tokens} tokens")
            if self._buffer.device != device:
                self._buffer = self._buffer.to(device)
            if self._floors is not None:
                budgets, floors = self._buffer[:tokens], self._floors.to(device)
                return StepBudgets(self.of_layer(budgets, layer), self.of_layer(floors, layer), self._filled_cap)
            if self._requests is not None and self.k_min is None:
                return self._shared(self._filled, self._requests, device, layer)
            if self.spread is not None:
                return self._step(self._buffer[:tokens], self._filled.long(), layer)
            key = (device, self.k_min, self.cap)
            if self._ready is None or self._ready[0] != key:
                self._ready = key, self._step(self._buffer[:tokens], self._filled.long(), layer)
            return self._ready[1]
        if self.rows is None and self.k_active == self.full_budget and self.cap is None:
            return None
        if self.rows is not None and (not len(self.rows) or tokens % len(self.rows)):
            raise PrismError(f"budgets of {len(self.rows)} rows do not fit a step of {tokens} tokens")
        if self.sharing is not None and self.k_min is None and self.batch is not None:
            requests = torch.arange(self.batch[0]).repeat_interleave(self.batch[1])
            means = torch.tensor([float(self.k_active)]) if self.rows is None else self.rows
            return self._shared(means.double().repeat_interleave(tokens // len(means)), requests, device, layer)
        if self.rows is not None:
            each = self.rows.long().repeat_interleave(tokens // len(self.rows))
            return self._step(each.to(device), each, layer)
        mine = self._number(int(self.k_active), layer)
        if mine == self.full_budget and self.cap is None:
            return None
        if self._same is None or self._same[0] != (tokens, mine, device):
            with torch.inference_mode(False):  # it is used again, perhaps where gradients are wanted
                self._same = (tokens, mine, device), torch.full((tokens,), mine, device=device)
        return self._with_floor(self._same[1], tokens * mine, layer)

    def spend(self, step: StepBudgets) -> tuple[StepBudgets, Tensor | None]:
        """Budgets of sub-experts to look at, and neurons every token runs, int64 ``[T]`` on the CPU; None for all."""
        if self.plan is None:
            return step, None
        key = (self.plan, step.k_active, step.k_min, step.cap)
        if self._spent is None or any(a is not b for a, b in zip(self._spent[0], key, strict=True)):
            with torch.inference_mode(False):  # as above
                self._spent = key, self._spend(self.plan, step)
        return self._spent[1]

    @staticmethod
    def _spend(plan: Plan, step: StepBudgets) -> tuple[StepBudgets, Tensor | None]:
        budgets = step.k_active.cpu()
        if not bool(plan.skips[budgets].any()):
            return step, None
        scan = plan.scan[budgets]
        device = step.k_active.device
        if step.k_min is None:
            looked = StepBudgets(scan.to(device), pairs=int(scan.sum()))
        else:  # how many pairs there are depends on what the batch loads
            looked = StepBudgets(scan.to(device), plan.scan[step.k_min.cpu()].to(device), step.cap)
        return looked, plan.neurons[budgets]

    def _step(self, budgets: Tensor, on_host: Tensor, layer: int) -> StepBudgets:
        return self._with_floor(self.of_layer(budgets, layer), int(self.of_layer(on_host, layer).sum()), layer)

    def _shared(self, means: Tensor, requests: Tensor, device: torch.device, layer: int) -> StepBudgets:
        if self.spread is not None:  # between the layer's budgets of the whole numbers below and above
            low, high = self.spread[layer][means.floor().long()], self.spread[layer][means.ceil().long()]
            means = low + (means - means.floor()) * (high - low)
        budgets = means.long()
        return StepBudgets(budgets.to(device), pairs=int(budgets.sum()), means=means, requests=requests)

    def _with_floor(self, mine: Tensor, pairs: int, layer: int) -> StepBudgets:
        if self.k_min is None:
            return StepBudgets(mine, pairs=pairs)
        return StepBudgets(mine, mine.clamp(max=self._number(self.k_min, layer)), self.cap)

    def _number(self, k_active: int, layer: int) -> int:
        return k_active if self.spread is None else int(self.spread[layer, k_active])


def spread_table(layer_budgets: Sequence[Sequence[int]]) -> Tensor:
    """``Dial.spread`` from the budget of every layer for the budgets 1, 2, ...; index 0 is not used."""
    rows = torch.tensor(layer_budgets, dtype=torch.int64)
    return torch.cat([torch.zeros(1, rows.shape[1], dtype=torch.int64), rows]).t().contiguous()


def named_points(full_budget: int, loss: Mapping[int, float]) -> dict[str, int]:
    """Operating points by name, from measured token losses.

    Args:
        full_budget: k * N.
        loss: budget -> mean token loss in nats, of the budgets that were measured.

    Returns:
        "full", and each of "high", "medium" and "low" (at most 1, 5 and 15 % above the perplexity of full
        budget) if full budget is among the measured.
    """
    points = {FULL: full_budget}
    if full_budget in loss:
        for name, rise in NAMED_RISES.items():
            # 1 + rise = ppl / ppl_full = exp(loss - loss_full)
            within = [k for k in loss if loss[k] - loss[full_budget] <= torch.log1p(torch.tensor(rise)).item()]
            points[name] = min(within)
    return points

"""The dial of one model: how many sub-experts its tokens may run, now.

One object is shared by all layers of a model. Knows nothing of scores or weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import PrismError
from .plan import Plan

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
    """

    k_active: Tensor
    k_min: Tensor | None = None
    cap: int | None = None
    pairs: int | None = None


class Dial:
    """The budgets in force.

    Attributes:
        full_budget: k * N; at it the model takes its own path.
        k_active: the budget of every token, 1..full_budget, where no other is set.
        rows: budgets of the rows of a batch, int64 ``[B]``, or None.
        k_min: with it, selection looks at the whole batch (see ``set_budget``).
        cap: different sub-experts that a layer may touch in a step.
        executor: name of the executor, or "auto".
        points: named operating points -> budget, as far as any were measured.
        plan: how budgets are spent on neurons; None: on whole sub-experts.
    """

    def __init__(self, full_budget: int) -> None:
        self.full_budget = full_budget
        self.k_active = full_budget
        self.rows: Tensor | None = None
        self.k_min: int | None = None
        self.cap: int | None = None
        self.executor = "auto"
        self.points: dict[str, int] = {FULL: full_budget}
        self.plan: Plan | None = None
        self._buffer = torch.empty(0, dtype=torch.int64)
        self._filled: int | None = None
        self._floors: Tensor | None = None
        self._filled_cap: int | None = None
        self._pairs = 0

    def check(self, k_active: object) -> int:
        """``k_active`` itself; raises PrismError if it is not a whole number in range."""
        if (
            isinstance(k_active, bool)
            or not isinstance(k_active, Integral)
            or not 1 <= int(k_active) <= self.full_budget
        ):
            raise PrismError(
                f"k_active must be a whole number from 1 to {self.full_budget} (full budget), got {k_active!r}"
            )
        return int(k_active)

    def resolve(self, value: Budget) -> int:
        """A budget from a whole number, a share in (0, 1] (a float) or the name of an operating point.

        A share is rounded down, but to one at least: a budget is a limit.

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
            if not 0 < value <= 1:
                raise PrismError(f"a share must be in (0, 1], got {value}; give budgets as whole numbers")
            return max(1, int(value * self.full_budget + 1e-9))
        return self.check(value)

    def fill(
        self, budgets: Sequence[int] | Tensor | None, floors: Tensor | None = None, cap: int | None = None
    ) -> None:
        """Budgets of the next forward's tokens, until changed; None returns to ``k_active``.

        They are copied into one persistent buffer, which all layers read.

        Args:
            budgets: one per token, in the order of the flattened batch; a tensor must be on the CPU.
            floors: int64 ``[T]`` on the CPU; with them, selection looks at the whole batch (see ``set_budget``), and
                this is what each token is sure of.
            cap: different sub-experts that a layer may touch; needs floors.

        Raises:
            PrismError: a value is out of range.
        """
        if budgets is None:
            self._filled = self._floors = self._filled_cap = None
            return
        self._floors, self._filled_cap = floors, cap
        values = torch.as_tensor(budgets, dtype=torch.int64, device="cpu")
        if len(values) and not 1 <= int(values.min()) <= int(values.max()) <= self.full_budget:
            bad = values[(values < 1) | (values > self.full_budget)][0]
            raise PrismError(f"k_active must be from 1 to {self.full_budget} (full budget), got {int(bad)}")
        if len(self._buffer) < len(values):
            self._buffer = torch.empty(len(values), dtype=torch.int64, device=self._buffer.device)
        self._buffer[: len(values)].copy_(values)
        self._filled, self._pairs = len(values), int(values.sum())

    def step(self, tokens: int, device: torch.device) -> StepBudgets | None:
        """Budgets of a forward of ``tokens`` tokens; None where all of them run everything.

        Raises:
            PrismError: the filled buffer or the rows do not fit the number of tokens.
        """
        if self._filled is not None:
            if self._filled != tokens:
                raise PrismError(f"{self._filled} budgets were filled in, but the step has {tokens} tokens")
            if self._buffer.device != device:
                self._buffer = self._buffer.to(device)
            if self._floors is not None:
                return StepBudgets(self._buffer[:tokens], self._floors.to(device), self._filled_cap)
            return self._step(self._buffer[:tokens], self._pairs)
        if self.rows is not None:
            if not len(self.rows) or tokens % len(self.rows):
                raise PrismError(f"budgets of {len(self.rows)} rows do not fit a step of {tokens} tokens")
            each = tokens // len(self.rows)
            return self._step(self.rows.to(device).repeat_interleave(each), int(self.rows.sum()) * each)
        if self.k_active == self.full_budget and self.cap is None:
            return None
        return self._step(torch.full((tokens,), self.k_active, device=device), tokens * self.k_active)

    def spend(self, step: StepBudgets) -> tuple[StepBudgets, Tensor | None]:
        """Budgets of sub-experts to look at, and neurons every token runs, int64 ``[T]`` on the CPU; None for all."""
        if self.plan is None:
            return step, None
        budgets = step.k_active.cpu()
        if not bool(self.plan.skips[budgets].any()):
            return step, None
        scan = self.plan.scan[budgets]
        device = step.k_active.device
        if step.k_min is None:
            looked = StepBudgets(scan.to(device), pairs=int(scan.sum()))
        else:  # how many pairs there are depends on what the batch loads
            looked = StepBudgets(scan.to(device), self.plan.scan[step.k_min.cpu()].to(device), step.cap)
        return looked, self.plan.neurons[budgets]

    def _step(self, budgets: Tensor, pairs: int) -> StepBudgets:
        if self.k_min is None:
            return StepBudgets(budgets, pairs=pairs)
        return StepBudgets(budgets, budgets.clamp(max=self.k_min), self.cap)


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

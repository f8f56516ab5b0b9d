"""What a policy is, and what all of them share.

A policy is a frozen dataclass in one file, registered under a name. ``plan`` is a pure function: it keeps nothing
between calls, so the same state and time give the same plan, in an engine as in the simulator. Knows no engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ...errors import PrismError
from ...registry import Registry
from ..cost_model import CostModel
from ..requests import Limits, Request, State, StepPlan, memory_of


@dataclass(frozen=True)
class Policy(ABC):
    """Base of all policies.

    Attributes:
        cost: predicts step times.
    """

    cost: CostModel = field(repr=False)

    @abstractmethod
    def plan(self, state: State, now: float) -> StepPlan:
        """What the engine does next.

        Every running request is in ``budgets`` unless its prompt has to wait for its turn; a budget is never below
        the request's floor; what is admitted fits the limits.
        """


POLICIES: Registry[Policy] = Registry("policy")


def positive(**values: float) -> None:
    """Raise PrismError for an option that is not above zero."""
    for name, value in values.items():
        if not value > 0:
            raise PrismError(f"{name} must be above 0, got {value}")


def memory_left(state: State) -> float:
    """Tokens of memory that running requests have not reserved."""
    if state.limits.memory_tokens is None:
        return float("inf")
    return state.limits.memory_tokens - sum(memory_of(r.request) for r in state.running)


def those_that_fit(requests: Iterable[Request], state: State) -> list[Request]:
    """The first of them until a limit is reached; none overtakes one that does not fit."""
    left, places = memory_left(state), state.limits.max_running - len(state.running)
    chosen: list[Request] = []
    for request in requests:
        left -= memory_of(request)
        if left < 0 or len(chosen) >= places:
            break
        chosen.append(request)
    return chosen


def prefill_pieces(pending: Sequence[tuple[str, int]], limits: Limits) -> dict[str, int]:
    """Prompt tokens of one step: (id, tokens left) in order, cut where ``max_prefill`` is reached."""
    left = float("inf") if limits.max_prefill is None else limits.max_prefill
    pieces: dict[str, int] = {}
    for name, tokens in pending:
        if left < 1:
            break
        pieces[name] = int(min(tokens, left))
        left -= pieces[name]
    return pieces

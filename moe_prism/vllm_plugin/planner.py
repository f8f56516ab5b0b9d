"""Budgets of a step from our policy, for a scheduler that decides by itself who runs and how many tokens.

vLLM's scheduler has admitted requests and cut prompts already; of the policy's plan only the budgets are used. A
request that the policy would have left out of the step runs at its floor: time is short then. Knows nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..scheduling import Limits, Policy, Request, Running, State


@dataclass
class Track:
    """One request between its arrival and its end.

    Attributes:
        request: as policies see it.
        first_token: when its first token came, or None.
        budget: of its last step, 0 before the first.
        tokens: generated.
        work: sum of their budgets.
    """

    request: Request
    first_token: float | None = None
    budget: int = 0
    tokens: int = 0
    work: int = 0

    @property
    def mean_budget(self) -> float:
        """Of the generated tokens."""
        return self.work / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class Part:
    """What one request computes in a step.

    Attributes:
        id: of the request.
        before: its tokens whose keys and values are there.
        count: tokens of this step.
        generated: tokens it has, those under way included.
    """

    id: str
    before: int
    count: int
    generated: int


@dataclass
class Planner:
    """Asks the policy once a step.

    Attributes:
        policy: gives budgets.
        limits: of the engine.
        tracks: requests that are not finished, by id.
        admitted: requests that have started so far.
    """

    policy: Policy
    limits: Limits
    tracks: dict[str, Track] = field(default_factory=dict)
    admitted: int = 0

    def budgets(self, parts: Sequence[Part], waiting: Sequence[str], now: float) -> dict[str, int]:
        """The budget of every request of the step, within its own bounds.

        Args:
            parts: requests that take part, in order of admission.
            waiting: ids of those that do not run yet, in order of arrival.
            now: seconds, on the clock of the requests' arrivals.
        """
        running = []
        for part in parts:
            track = self.tracks[part.id]
            if not track.budget:
                self.admitted += 1
            if part.generated and track.first_token is None:
                track.first_token = now
            prefilled = min(part.before, track.request.prompt_tokens)
            generated = max(part.generated, int(prefilled == track.request.prompt_tokens))
            running.append(Running(track.request, prefilled, generated, track.first_token, track.budget))
        asked: Mapping[str, int] = {}
        if any(one.request.k_min < one.request.k_active for one in running):  # or there is nothing to decide
            state = State([self.tracks[id].request for id in waiting], running, self.limits, self.admitted)
            asked = self.policy.plan(state, now).budgets
        return {part.id: self._within(part.id, asked) for part in parts}

    def _within(self, id: str, asked: Mapping[str, int]) -> int:
        track = self.tracks[id]
        wanted = track.request
        track.budget = min(max(asked.get(id, wanted.k_min), wanted.k_min), wanted.k_active)
        return track.budget

"""What a client sees of a request, whoever served it: an engine, the simulator or a server at the other end of a wire.

Times are seconds on one clock, the one that ``Request.arrival`` is on. Knows no policy and no engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .requests import Request, Running


@dataclass(frozen=True)
class Job:
    """A request of a workload and how many tokens it really generates, 1 .. max_tokens."""

    request: Request
    output_tokens: int


@dataclass
class Outcome:
    """What became of a request.

    Attributes:
        job: what was asked for.
        replica: which engine served it.
        admitted, first_token, finished: NaN until they happen.
        prefilled: prompt tokens computed so far.
        tokens: generated so far.
        budget: of its last step; see ``Running``.
        prompt_budgets: budget -> prompt tokens computed at it.
        token_budgets: budget -> tokens generated at it; the first one comes with the prompt's last piece.
        refused: it was turned away at admission; nothing else happens to it.
    """

    job: Job
    replica: int = 0
    admitted: float = math.nan
    first_token: float = math.nan
    finished: float = math.nan
    prefilled: int = 0
    tokens: int = 0
    budget: int = 0
    prompt_budgets: dict[int, int] = field(default_factory=dict)
    token_budgets: dict[int, int] = field(default_factory=dict)
    refused: bool = False

    def prefill(self, tokens: int, k_active: int) -> None:
        """A step computed these many prompt tokens."""
        self.prefilled += tokens
        self.budget = k_active
        self.prompt_budgets[k_active] = self.prompt_budgets.get(k_active, 0) + tokens

    def generate(self, k_active: int, now: float, tokens: int = 1) -> None:
        """It got tokens; ``now`` is when the first of them came."""
        if not self.tokens:
            self.first_token = now
        self.tokens += tokens
        self.budget = k_active
        self.token_budgets[k_active] = self.token_budgets.get(k_active, 0) + tokens

    @property
    def least(self) -> int:
        """The smallest budget that any of its tokens ran at; 0 before the first."""
        return min([*self.prompt_budgets, *self.token_budgets], default=0)

    def running(self) -> Running:
        """As a policy sees it."""
        first = None if math.isnan(self.first_token) else self.first_token
        return Running(self.job.request, self.prefilled, self.tokens, first, self.budget)

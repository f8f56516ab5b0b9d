"""The answer to a request, when it comes: impossible values are refused, hopeless objectives are never passed over.

An objective is hopeless if even an engine that is free misses it at the request's floor. Knows no queue and no engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from ..errors import PrismError
from .cost_model import CostModel
from .requests import Limits, Request


class Unmeetable(PrismError):
    """A request whose objectives no budget can meet, where such requests are refused."""


@dataclass(frozen=True)
class Admission:
    """Stands before any policy; an engine and the simulator ask it once for every request.

    Attributes:
        cost: predicts step times.
        limits: of the engine.
        hopeless: what to do where no budget can meet an objective: "serve" at the floor and mark, or "refuse".
    """

    cost: CostModel = field(repr=False)
    limits: Limits
    hopeless: Literal["serve", "refuse"] = "serve"

    def __post_init__(self) -> None:
        if self.hopeless not in ("serve", "refuse"):
            raise PrismError(f'hopeless must be "serve" or "refuse", got {self.hopeless!r}')

    def __call__(self, request: Request) -> Request:
        """The request as it enters the queue: itself, or marked ``best_effort`` with its floor as only budget.

        Raises:
            PrismError: it could never run here (see ``Limits.check``).
            Unmeetable: no budget can meet its objectives, and such requests are refused; says what could be met.
        """
        self.limits.check(request)
        missed = [
            f"{name} {wanted:g} (at least {least:.4g} here, alone and at budget {request.k_min})"
            for name, wanted, of in (
                ("ttft_ms", request.ttft_ms, self.least_ttft_ms),
                ("tpot_ms", request.tpot_ms, self.least_tpot_ms),
            )
            if wanted is not None and wanted < (least := of(request))
        ]
        if not missed:
            return request
        if self.hopeless == "refuse":
            raise Unmeetable(
                f"request {request.id}: no budget can meet {' and '.join(missed)}; ask for more time, or lower k_min"
            )
        return replace(request, k_active=request.k_min, best_effort=True)

    def least_ttft_ms(self, request: Request) -> float:
        """Milliseconds to the first token on an idle engine, at the floor or at full budget, whichever is faster."""
        piece = self.limits.max_prefill or request.prompt_tokens
        return 1e3 * min(
            self.cost.prefill_seconds(request.prompt_tokens, k, piece) for k in {request.k_min, request.k_active}
        )

    def least_tpot_ms(self, request: Request) -> float:
        """Milliseconds of a decode step of this request alone."""
        context = float(request.prompt_tokens)
        return 1e3 * min(self.cost.table(1, k, context) for k in {request.k_min, request.k_active})

"""What the requests of one step compute, and its forward pass.

Knows no queue and no clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..scheduling import Running, StepPlan
from .attention import Span
from .memory import Memory
from .requests import Generation
from .runner import Runner
from .sampling import Chosen, Sampler, choose


@dataclass
class Active:
    """An admitted request."""

    generation: Generation
    sampler: Sampler
    prefilled: int = 0
    generated: int = 0
    token: int = 0
    first_token: float | None = None
    budget: int = 0

    @property
    def in_prompt(self) -> bool:
        """Whether its prompt is not all computed."""
        return self.prefilled < self.generation.request.prompt_tokens

    def running(self) -> Running:
        """As a policy sees it."""
        return Running(self.generation.request, self.prefilled, self.generated, self.first_token, self.budget)


@dataclass(frozen=True)
class Part:
    """What a request computes in a step; ``drawn``: a token comes of it."""

    active: Active
    tokens: NDArray[np.int64]
    before: int
    drawn: bool


def parts_of(plan: StepPlan, running: Mapping[str, Active]) -> list[Part]:
    """Who computes what: requests that decode first."""
    decoding, prompts = [], []
    for id in plan.budgets:
        active = running[id]
        before, left = active.prefilled, active.generation.request.prompt_tokens - active.prefilled
        if left:
            count = min(left, plan.prefill[id])
            piece = np.array(active.generation.prompt[before : before + count], dtype=np.int64)
            prompts.append(Part(active, piece, before, count == left))
        else:
            token = np.array([active.token], dtype=np.int64)
            decoding.append(Part(active, token, before + active.generated - 1, True))
    return decoding + prompts


def run_parts(
    parts: list[Part], budgets: Mapping[str, int], cap: int | None, runner: Runner, memory: Memory
) -> list[Chosen]:
    """One forward pass and a token for every part that ends in one; a cap is for those that decode."""
    spans, last, first = [], [], 0
    for part in parts:
        start = memory.start(part.active.generation.request.id)
        spans.append(Span(first, len(part.tokens), start, part.before))
        first += len(part.tokens)
        if part.drawn:
            last.append(first - 1)
    tokens = np.concatenate([part.tokens for part in parts])
    each = [budgets[part.active.generation.request.id] for part in parts]
    floors = [
        k if part.active.in_prompt else part.active.generation.request.k_min
        for part, k in zip(parts, each, strict=True)
    ]
    logits = runner.forward(tokens, spans, each, last, floors, cap)
    return choose([part.active.sampler for part in parts if part.drawn], logits)

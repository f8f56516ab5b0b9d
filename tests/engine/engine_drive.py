"""Drive an engine in tests, and the truth to compare it with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_prism.elastic import full_budget
from moe_prism.engine import Engine, FailedEvent, Generation, Sampling, TokenEvent
from moe_prism.scheduling import CostModel, Limits, Policy, Request, State, StepPlan
from moe_prism.scheduling.policies.base import memory_left, prefill_pieces
from moe_prism.scheduling.requests import memory_of
from moe_prism.scheduling.step_load import TERMS

COST = CostModel((1e-3,) * len(TERMS), 16, 32)


@dataclass(frozen=True)
class AtFloor(Policy):
    """Admits what fits and runs everyone at its floor; ``later`` requests start one step after the others."""

    cost: CostModel = field(default=COST, repr=False)
    one_by_one: bool = False

    def plan(self, state: State, now: float) -> StepPlan:
        left, admitted = memory_left(state), []
        for request in state.waiting[: state.limits.max_running - len(state.running)]:
            left -= memory_of(request)
            if left < 0 or (self.one_by_one and admitted):
                break
            admitted.append(request)
        floors = {r.request.id: r.request.k_min for r in state.running} | {r.id: r.k_min for r in admitted}
        pending = [(r.request.id, r.prefill_left) for r in state.running if r.prefill_left]
        pieces = prefill_pieces([*pending, *((r.id, r.prompt_tokens) for r in admitted)], state.limits)
        busy = [r.request.id for r in state.running if not r.prefill_left] + list(pieces)
        return StepPlan(tuple(r.id for r in admitted), {id: floors[id] for id in busy}, pieces)


def engine_of(model: PreTrainedModel, policy: Policy | None = None, **limits: Any) -> Engine:
    """An engine with room for 8 requests and 512 tokens."""
    sizes: dict[str, Any] = {"max_running": 8, "memory_tokens": 512}
    return Engine(model, policy or AtFloor(), Limits(full_budget(model), **sizes | limits))


def generation(id: str, prompt: list[int], tokens: int, k: int, sampling: Sampling | None = None) -> Generation:
    """A request that runs at exactly k."""
    return Generation(Request(id, 0.0, len(prompt), tokens, k, k), prompt, sampling or Sampling(logprobs=1))


def drain(engine: Engine) -> dict[str, list[TokenEvent | FailedEvent]]:
    """Step until nothing waits or runs."""
    events: dict[str, list[TokenEvent | FailedEvent]] = {}
    while engine.stats.waiting or engine.stats.running:
        for event in engine.step():
            events.setdefault(event.id, []).append(event)
    return events


def tokens_of(events: list[TokenEvent | FailedEvent]) -> list[int]:
    """Generated tokens; fails where there is an error."""
    assert all(isinstance(event, TokenEvent) for event in events), events
    return [event.token for event in events if isinstance(event, TokenEvent)]


def alone(model: PreTrainedModel, prompt: list[int], tokens: int, k: int) -> tuple[list[int], list[float]]:
    """What transformers' own ``generate`` gives one prompt: greedy tokens and their log-probabilities."""
    ids = torch.tensor([prompt])
    out: Any = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        eos_token_id=-1,  # none
        do_sample=False,
        k_active=k,
        output_logits=True,
        return_dict_in_generate=True,
    )
    chosen = out.sequences[0, len(prompt) :]
    logprobs = torch.stack(out.logits)[:, 0].log_softmax(-1)
    return chosen.tolist(), logprobs.gather(1, chosen[:, None])[:, 0].tolist()

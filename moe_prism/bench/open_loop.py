"""Requests sent to an engine when they are due, whatever became of those before. Knows no policy and no figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..engine import Engine, FailedEvent, Generation, Sampling
from ..scheduling import Job, Outcome


def serve_jobs(
    engine: Engine, jobs: Sequence[Job], vocabulary: int, seed: int, tell: Callable[[int, int], None] | None = None
) -> tuple[list[Outcome], float]:
    """Send requests when they are due, whatever became of those before, and see them through.

    Args:
        engine: idle.
        jobs: sorted by arrival, in seconds from now.
        vocabulary: prompts are random ids below it.
        seed: of the prompts.
        tell: called with (requests ended, in all).

    Returns:
        Outcomes in order of arrival, and seconds from the first arrival to the last token.

    Raises:
        RuntimeError: the engine failed a request.
    """
    rng = np.random.default_rng((seed, 4))
    prompts = [rng.integers(0, vocabulary, job.request.prompt_tokens).tolist() for job in jobs]
    start = engine.clock() - (jobs[0].request.arrival if jobs else 0.0)
    shifted = [replace(job.request, arrival=job.request.arrival + start) for job in jobs]
    outcomes: dict[str, Outcome] = {}
    sent = ended = 0
    now = engine.clock()
    while ended < len(jobs):
        while sent < len(jobs) and shifted[sent].arrival <= now:
            request = shifted[sent]
            engine.submit(Generation(request, prompts[sent], Sampling()))
            outcomes[request.id] = Outcome(replace(jobs[sent], request=request))
            sent += 1
        began = engine.clock()
        steps = engine.stats.steps
        events = engine.step()
        now = engine.clock()
        if engine.stats.steps == steps:
            engine.wait(min(1.0, max(0.0, shifted[sent].arrival - now)) if sent < len(jobs) else 1.0)
            now = engine.clock()
            continue
        plan = engine.stats.plan
        assert plan is not None  # there was a step
        for id in plan.admit:
            outcomes[id].admitted = began
        for id, tokens in plan.prefill.items():
            outcomes[id].prefill(tokens, plan.budgets[id])
        for event in events:
            if isinstance(event, FailedEvent):
                raise RuntimeError(f"request {event.id} failed: {event.error}")
            outcome = outcomes[event.id]
            outcome.generate(event.budget, now)
            if event.finished:
                outcome.finished = now
                ended += 1
        if tell is not None:
            tell(ended, len(jobs))
    return list(outcomes.values()), now - start - (jobs[0].request.arrival if jobs else 0.0)

"""Load over HTTP: the official OpenAI client sends a workload to a server and notes what comes back.

Times are the client's own, so queues, sockets and the client's work are in them. Knows no engine: any server of this
project's API can be at the other end; of another's, only the tokens and times are told.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from openai import APIError, AsyncOpenAI, RateLimitError

from ..scheduling.outcomes import Job, Outcome
from ..scheduling.summary import summarise


@dataclass
class HttpRun:
    """What became of a workload.

    Attributes:
        outcomes: of all requests; their times are seconds since the run began.
        errors: kind of error -> requests that ended in it; refusals of a full queue are not among them.
        seconds: from the first request to the last token.
    """

    outcomes: list[Outcome] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def record(self, kl: Mapping[int, float] | None = None) -> dict[str, Any]:
        """The figures of ``summarise``, without those of prompts' budgets, which a client cannot see."""
        figures = summarise(self.outcomes, self.seconds, kl)
        seen = {name: value for name, value in figures.items() if not name.startswith("mean_prompt")}
        return {**seen, "errors": dict(self.errors), "seconds": self.seconds}


@dataclass(frozen=True)
class HttpLoad:
    """A client of one server.

    Attributes:
        url: of the server, without /v1.
        model: its name there.
        elastic: whether the server takes this project's fields.
        stream: whether replies come token by token; without it there is no time to first token.
        timeout: seconds until a request counts as an error.
    """

    url: str
    model: str
    elastic: bool = True
    stream: bool = True
    timeout: float = 300.0

    def replay(self, jobs: Sequence[Job], prompts: Sequence[Sequence[int] | str]) -> HttpRun:
        """Open loop: every request is sent at its arrival, whatever became of the others."""
        return asyncio.run(self._replay(jobs, prompts))

    def saturate(self, jobs: Sequence[Job], prompts: Sequence[Sequence[int] | str], clients: int) -> HttpRun:
        """Closed loop: so many clients, each of which sends its next request when it has the reply to its last."""
        return asyncio.run(self._saturate(jobs, prompts, clients))

    def _client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=self.timeout)

    async def _replay(self, jobs: Sequence[Job], prompts: Sequence[Sequence[int] | str]) -> HttpRun:
        run = HttpRun()
        async with self._client() as client:
            began = time.perf_counter()

            async def later(job: Job, prompt: Sequence[int] | str) -> None:
                await asyncio.sleep(max(0.0, began + job.request.arrival - time.perf_counter()))
                await self._one(client, job, prompt, began, run)

            await asyncio.gather(*(later(job, prompt) for job, prompt in zip(jobs, prompts, strict=True)))
        return _timed(run)

    async def _saturate(self, jobs: Sequence[Job], prompts: Sequence[Sequence[int] | str], clients: int) -> HttpRun:
        run = HttpRun()
        todo = iter(zip(jobs, prompts, strict=True))
        async with self._client() as client:
            began = time.perf_counter()

            async def one_client(mine: Iterable[tuple[Job, Sequence[int] | str]]) -> None:
                for job, prompt in mine:  # shared: each takes the next
                    now = time.perf_counter() - began
                    sent = replace(job, request=replace(job.request, arrival=now))
                    await self._one(client, sent, prompt, began, run)

            await asyncio.gather(*(one_client(todo) for _ in range(clients)))
        return _timed(run)

    async def _one(
        self, client: AsyncOpenAI, job: Job, prompt: Sequence[int] | str, began: float, run: HttpRun
    ) -> None:
        outcome = Outcome(job)
        run.outcomes.append(outcome)
        try:
            if self.stream:
                await self._streamed(client, outcome, prompt, began)
            else:
                reply = await client.completions.create(**self._ask(job, prompt))
                outcome.generate(self._budget(reply.usage), time.perf_counter() - began, reply.usage.completion_tokens)
            outcome.finished = time.perf_counter() - began
        except RateLimitError:
            outcome.refused = True
        except APIError as error:
            run.errors[type(error).__name__] += 1

    async def _streamed(self, client: AsyncOpenAI, outcome: Outcome, prompt: Sequence[int] | str, began: float) -> None:
        options = (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}} if self.elastic else {"stream": True}
        )
        async for chunk in await client.completions.create(**self._ask(outcome.job, prompt), **options):
            if chunk.choices:
                choice = chunk.choices[0]
                gained = chunk.usage.completion_tokens - outcome.tokens if chunk.usage is not None else 1
                outcome.generate(getattr(choice, "k_active", 0), time.perf_counter() - began, gained)

    def _ask(self, job: Job, prompt: Sequence[int] | str) -> dict[str, Any]:
        wanted = job.request
        ask: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": job.output_tokens,
            "temperature": 0,
        }
        if self.elastic:
            quality = {"k_min": wanted.k_min, "k_active": wanted.k_active}
            objectives = {"ttft_ms": wanted.ttft_ms, "tpot_ms": wanted.tpot_ms}
            ask["extra_body"] = {
                "ignore_eos": True,
                "priority": wanted.priority,
                "vllm_xargs": {**quality, **{name: value for name, value in objectives.items() if value is not None}},
            }
        return ask

    def _budget(self, usage: Any) -> int:
        return round(usage.mean_k_active) if self.elastic else 0


def _timed(run: HttpRun) -> HttpRun:
    ends = [o.finished for o in run.outcomes if not math.isnan(o.finished)]
    starts = [o.job.request.arrival for o in run.outcomes]
    run.seconds = max(ends, default=0.0) - min(starts, default=0.0)
    return run

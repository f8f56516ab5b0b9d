"""A body becomes generations for the engine, or an error that names the value, the allowed range and the way out.

Checks what depends on the model: its name, full budget and context. Knows nothing of HTTP connections or of threads.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..checkpoint.schema import OperatingPoints
from ..engine import Generation, Sampling
from ..errors import PrismError
from ..scheduling import Request
from ..scheduling.quality import BudgetError, budget_bounds
from .chat import chat_prompt
from .errors import ApiError
from .schema import MAX_CHOICES, ChatRequest, CompletionRequest, Quality

if TYPE_CHECKING:
    from ..offload import Statistics

DEFAULT_MAX_TOKENS = 16  # of completions, as in the OpenAI API; a chat may fill the context


@dataclass(frozen=True)
class ServedModel:
    """What is known of the model that is served.

    Attributes:
        name: what clients call it.
        tokenizer: of transformers.
        full_budget: k * N.
        context: tokens of prompt and output that one request may have.
        vocabulary: token ids are below it.
        end_tokens: ids that end an output.
        k_min: floor of requests that name neither ``k_min`` nor ``k_active``.
        created: when the server started, seconds since 1970.
        points: measured operating points, or None.
        named: names of operating points -> budget.
        blocks: what an offloaded model counts, as it goes on; None: the model is in memory.
    """

    name: str
    tokenizer: Any
    full_budget: int
    context: int
    vocabulary: int
    end_tokens: tuple[int, ...]
    k_min: int
    created: int
    points: OperatingPoints | None
    named: dict[str, int]
    blocks: Statistics | None = None


@dataclass(frozen=True)
class Job:
    """One HTTP request.

    Attributes:
        id: of the reply.
        generations: one per choice, prompt by prompt.
        stops: texts that end an output.
        logprobs: most likely tokens to report per token, or None.
        prompt_tokens: of all prompts, each counted once.
    """

    id: str
    generations: list[Generation]
    stops: tuple[str, ...]
    logprobs: int | None
    prompt_tokens: int


def completion_job(model: ServedModel, body: CompletionRequest, now: float) -> Job:
    """Generations of /v1/completions; raises ApiError for what the model cannot do."""
    _check_name(model, body.model)
    prompts = [_tokens(model, prompt, special=True) for prompt in body.prompts]
    return _job(model, body, "cmpl", prompts, body.max_tokens or DEFAULT_MAX_TOKENS, (), body.logprobs, now)


def chat_job(model: ServedModel, body: ChatRequest, now: float) -> Job:
    """Generations of /v1/chat/completions; raises ApiError for what the model cannot do."""
    _check_name(model, body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
    try:
        chat = chat_prompt(model.tokenizer, body.messages)
    except PrismError as error:
        raise ApiError(400, str(error), param="messages") from None
    prompt = _tokens(model, chat.text, special=not chat.complete)
    most = body.max_completion_tokens or body.max_tokens or max(1, model.context - len(prompt))
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _job(model, body, "chatcmpl", [prompt], most, chat.stops, logprobs, now)


def _job(
    model: ServedModel,
    body: CompletionRequest | ChatRequest,
    kind: str,
    prompts: Sequence[list[int]],
    max_tokens: int,
    stops: tuple[str, ...],
    logprobs: int | None,
    now: float,
) -> Job:
    n = body.n or 1
    if n * len(prompts) > MAX_CHOICES:
        raise ApiError(
            400, f"n: {n} choices of {len(prompts)} prompts are more than {MAX_CHOICES}; send fewer at once", param="n"
        )
    k_min, k_active = budgets(model, body.vllm_xargs)
    name = f"{kind}-{secrets.token_hex(12)}"
    generations: list[Generation] = []
    for prompt in prompts:
        if len(prompt) + max_tokens > model.context:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens and max_tokens is {max_tokens}; together they must not exceed "
                f"the context of {model.context} tokens. Shorten the prompt or lower max_tokens",
                param="messages" if kind == "chatcmpl" else "prompt",
                code="context_length_exceeded",
            )
        for choice in range(n):
            index = len(generations)
            request = Request(
                id=f"{name}-{index}",
                arrival=now,
                prompt_tokens=len(prompt),
                max_tokens=max_tokens,
                k_min=k_min,
                k_active=k_active,
                ttft_ms=body.vllm_xargs.ttft_ms,
                tpot_ms=body.vllm_xargs.tpot_ms,
                priority=body.priority,
            )
            sampling = Sampling(
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                seed=None if body.seed is None else (body.seed + choice) % 2**63,
                stop_token_ids=() if body.ignore_eos else model.end_tokens,
                logprobs=logprobs,
            )
            generations.append(Generation(request, prompt, sampling))
    return Job(name, generations, (*body.stops, *stops), logprobs, sum(map(len, prompts)))


def budgets(model: ServedModel, quality: Quality) -> tuple[int, int]:
    """Floor and most wanted budget; see ``scheduling.quality``."""
    try:
        return budget_bounds(quality.k_min, quality.k_active, model.full_budget, model.k_min)
    except BudgetError as error:
        raise ApiError(400, str(error), param=f"vllm_xargs.{error.field}") from None


def _check_name(model: ServedModel, name: str) -> None:
    if name != model.name:
        raise ApiError(
            404,
            f"model: no model {name[:100]!r} here; this server has {model.name!r}",
            param="model",
            code="model_not_found",
        )


def _tokens(model: ServedModel, prompt: str | list[int], special: bool) -> list[int]:
    if isinstance(prompt, str):
        ids: list[int] = model.tokenizer.encode(prompt, add_special_tokens=special)
        if not ids:
            raise ApiError(400, "prompt: it has no tokens; give at least one word", param="prompt")
        return ids
    if max(prompt) >= model.vocabulary:
        raise ApiError(
            400, f"prompt: token ids must be from 0 to {model.vocabulary - 1}, got {max(prompt)}", param="prompt"
        )
    return prompt

"""What came from the engine becomes the choices of a reply, whole or in chunks.

Both endpoints share everything but a few field names. Knows nothing of engines' threads or of connections.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..engine import TokenEvent
from .admission import Job, ServedModel
from .detokenise import Detokeniser


@dataclass
class Choice:
    """One output as it grows.

    Attributes:
        index: of the choice.
        text: text of the detokeniser.
        events: tokens whose log-probabilities were not reported yet; stays empty where nobody asked.
        tokens: how many came.
        work: sum of their budgets.
        k_active: budget of the last one.
        finish_reason: "stop" or "length" once it has ended.
    """

    index: int
    text: Detokeniser
    logprobs: int | None
    events: list[TokenEvent] = field(default_factory=list)
    tokens: int = 0
    work: int = 0
    k_active: int = 0
    finish_reason: str | None = None
    offset: int = 0

    def add(self, events: Sequence[TokenEvent], end_tokens: tuple[int, ...]) -> str:
        """The new text; sets ``finish_reason`` when a stop text, a stop token or the last token came."""
        if events[-1].finished is not None and not self.text.stops:  # nothing can end it sooner: decoded at once
            tokens = [event.token for event in events if not self._count(event, end_tokens)]
            self.finish_reason = events[-1].finished
            return self.text.finish(tokens)
        said = []
        for event in events:
            said.append("" if self._count(event, end_tokens) else self.text.add(event.token))
            if event.finished is not None and not self.text.stopped:
                said.append(self.text.finish())
            self.finish_reason = "stop" if self.text.stopped else event.finished
            if self.finish_reason is not None:
                break
        return "".join(said)

    def _count(self, event: TokenEvent, end_tokens: tuple[int, ...]) -> bool:
        """Notes a token; returns whether it is one that ends the output and is no part of its text."""
        self.tokens += 1
        self.work += event.budget
        self.k_active = event.budget
        if self.logprobs is not None:
            self.events.append(event)
        return event.finished == "stop" and event.token in end_tokens


class Reply:
    """The reply to one HTTP request.

    Args:
        model: what is served.
        job: what was asked for.
        chat: which endpoint's field names to use.
        best_effort: no budget can meet the objectives; the usage says so.
    """

    def __init__(self, model: ServedModel, job: Job, chat: bool, best_effort: bool) -> None:
        self._best_effort = best_effort
        self._model = model
        self._job = job
        self._chat = chat
        self.choices = {
            generation.request.id: Choice(i, Detokeniser(model.tokenizer, generation.prompt, job.stops), job.logprobs)
            for i, generation in enumerate(job.generations)
        }
        self.created = int(time.time())
        kind = "chat.completion.chunk" if chat else "text_completion"
        head = {"id": job.id, "object": kind, "created": self.created, "model": model.name}
        self._head = json.dumps(head, separators=(",", ":"))[:-1]

    @property
    def finished(self) -> bool:
        """Whether every choice has ended."""
        return all(choice.finish_reason for choice in self.choices.values())

    def usage(self) -> dict[str, Any]:
        """Tokens, and the mean budget of the generated ones."""
        tokens = sum(choice.tokens for choice in self.choices.values())
        work = sum(choice.work for choice in self.choices.values())
        return {
            "prompt_tokens": self._job.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self._job.prompt_tokens + tokens,
            "mean_k_active": round(work / tokens, 4) if tokens else None,
            **({"best_effort": True} if self._best_effort else {}),
        }

    def whole(self, texts: dict[str, list[str]]) -> dict[str, Any]:
        """The body of a reply that is not streamed, from the pieces of text of every choice."""
        choices = []
        for name, choice in self.choices.items():
            text = "".join(texts[name])
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            choices.append(
                {
                    "index": choice.index,
                    **said,
                    "logprobs": self._logprobs(choice),
                    "finish_reason": choice.finish_reason,
                }
            )
        kind = "chat.completion" if self._chat else "text_completion"
        head = {"id": self._job.id, "object": kind, "created": self.created, "model": self._model.name}
        return {**head, "choices": choices, "usage": self.usage()}

    def opening(self) -> bytes:
        """First chunk of every choice: in a chat it names the role."""
        if not self._chat:
            return b""
        return b"".join(
            self._chunk(c.index, '"delta":{"role":"assistant","content":""}', "null", None, None, None)
            for c in self.choices.values()
        )

    def chunk(self, choice: Choice, text: str, usage: bool) -> bytes:
        """One server-sent event with the new text; empty where there is nothing to say."""
        if not text and choice.finish_reason is None:
            return b""
        quoted = json.dumps(text)
        said = f'"delta":{{"content":{quoted}}}' if self._chat else f'"text":{quoted}'
        logprobs = "null" if choice.logprobs is None else json.dumps(self._logprobs(choice))
        return self._chunk(
            choice.index, said, logprobs, choice.finish_reason, choice.k_active, self.usage() if usage else None
        )

    def closing(self, usage: bool) -> bytes:
        """Last events: the usage where it was asked for, and the end mark."""
        last = f'data: {self._head},"choices":[],"usage":{json.dumps(self.usage())}}}\n\n' if usage else ""
        return (last + "data: [DONE]\n\n").encode()

    def _chunk(
        self,
        index: int,
        said: str,
        logprobs: str,
        finish_reason: str | None,
        k_active: int | None,
        usage: dict[str, Any] | None,
    ) -> bytes:
        reason = "null" if finish_reason is None else f'"{finish_reason}"'
        budget = "" if k_active is None else f',"k_active":{k_active}'
        tail = "" if usage is None else f',"usage":{json.dumps(usage)}'
        return (
            f'data: {self._head},"choices":[{{"index":{index},{said},"logprobs":{logprobs},'
            f'"finish_reason":{reason}{budget}}}]{tail}}}\n\n'
        ).encode()

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        """Of the tokens that were not reported yet, in the endpoint's shape."""
        if choice.logprobs is None:
            return None
        events, choice.events = choice.events, []
        if self._chat:
            return {"content": [self._of_chat(event) for event in events], "refusal": None}
        texts = [self._piece(event.token) for event in events]
        offsets = []
        for text in texts:
            offsets.append(choice.offset)
            choice.offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [event.logprob for event in events],
            "top_logprobs": [{self._piece(t): p for t, p in event.top} for event in events],
            "text_offset": offsets,
        }

    def _of_chat(self, event: TokenEvent) -> dict[str, Any]:
        top = [self._entry(token, logprob) for token, logprob in event.top]
        return {**self._entry(event.token, event.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self._piece(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _piece(self, token: int) -> str:
        text: str = self._model.tokenizer.decode([token])
        return text

"""From an accepted job to its answer: whole or streamed, cancelled when the client goes away.

Knows nothing of routes or of how an engine works.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from ..engine import FailedEvent, TokenEvent
from .admission import Job, ServedModel
from .bridge import Bridge, Event, Mailbox
from .errors import ApiError
from .replies import Reply
from .schema import ChatRequest, CompletionRequest
from .streams import ClientGone, EventStream, unless_gone


class Answering:
    """Answers jobs.

    Args:
        model: what is served.
        bridge: to the engine.
    """

    def __init__(self, model: ServedModel, bridge: Bridge) -> None:
        self._model = model
        self._bridge = bridge

    async def answer(self, request: Request, job: Job, body: CompletionRequest | ChatRequest) -> Response:
        """The reply to a job.

        Raises:
            ApiError: refused, or failed before anything was sent.
        """
        mailbox = self._bridge.submit(job.generations, patient=not body.stream and not job.stops)
        reply = Reply(self._model, job, isinstance(body, ChatRequest), mailbox.best_effort)
        try:
            if not body.stream:
                return await unless_gone(request.receive, self._whole(mailbox, reply))
            # the status is still open until the first token: a failure before it is a plain error
            first = await unless_gone(request.receive, mailbox.take())
            _raise_failure(first)
        except ClientGone:
            self._bridge.close(mailbox)
            return Response(status_code=499)  # nobody reads it
        except BaseException:
            self._bridge.close(mailbox)
            raise
        return EventStream(self._chunks(mailbox, reply, first, *body.usage_of_chunks))

    async def _whole(self, mailbox: Mailbox, reply: Reply) -> Response:
        texts: dict[str, list[str]] = {name: [] for name in reply.choices}
        while not reply.finished:
            events = await mailbox.take()
            _raise_failure(events)
            for name, text in self._said(events, reply).items():
                texts[name].append(text)
        return JSONResponse(reply.whole(texts))

    async def _chunks(
        self, mailbox: Mailbox, reply: Reply, first: Sequence[Event], usage: bool, always: bool
    ) -> AsyncGenerator[bytes]:
        try:
            events, opening = first, reply.opening()
            while True:
                said = self._said(events, reply)
                chunks = b"".join(reply.chunk(reply.choices[name], text, always) for name, text in said.items())
                if opening or chunks:
                    yield opening + chunks
                    opening = b""
                if reply.finished:
                    break
                events = await mailbox.take()
                _raise_failure(events)
            yield reply.closing(usage)
        except ApiError as error:
            yield f"data: {json.dumps(error.body())}\n\ndata: [DONE]\n\n".encode()
        finally:
            self._bridge.close(mailbox)

    def _said(self, events: Sequence[Event], reply: Reply) -> dict[str, str]:
        """The new text of every choice that has any events; ends those whose stop text has come.

        Steps may be faster than the event loop, so a choice may have several events: they become one piece.
        """
        came: dict[str, list[TokenEvent]] = {}
        for event in events:
            if isinstance(event, TokenEvent) and reply.choices[event.id].finish_reason is None:
                came.setdefault(event.id, []).append(event)
        said = {}
        for name, some in came.items():
            choice = reply.choices[name]
            said[name] = choice.add(some, self._model.end_tokens)
            if choice.text.stopped:
                self._bridge.finish(name, "stop")
        return said


def _raise_failure(events: Sequence[Event]) -> None:
    for event in events:
        if isinstance(event, FailedEvent):
            raise ApiError(500, event.error, code="engine_error")

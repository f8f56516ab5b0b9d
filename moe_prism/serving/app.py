"""The application: routes and what they need, around one model and one engine.

Knows nothing of sockets, signals or of how the engine was made.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel

from ..engine import Engine
from ..errors import PrismError
from .admission import ServedModel, chat_job, completion_job
from .bridge import Bridge
from .errors import ApiError, ErrorReply, install
from .generate import Answering
from .guard import Guard
from .metrics import Metrics
from .schema import ChatRequest, CompletionRequest, allowed
from .web import page_html

P = ParamSpec("P")
T = TypeVar("T")
_LONG_BODY = 1 << 15

PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
# Nothing from elsewhere: also if a model's output found its way into the page's markup.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class ServerLimits:
    """What the server takes in.

    Attributes:
        api_key: needed for every path below /v1/; None: no key.
        max_waiting: requests that may wait for admission; more are answered 429.
        max_body: bytes of a request's body.
        drain_seconds: how long running requests may go on after SIGTERM.
    """

    api_key: str | None = None
    max_waiting: int = 256
    max_body: int = 1 << 20
    drain_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_waiting", "max_body", "drain_seconds"):
            value = getattr(self, name)
            if not value > 0:
                raise PrismError(f"{name} must be above 0, got {value}")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise PrismError("the API key must be printable ASCII and not empty")


class ModelCard(BaseModel):
    """An entry of /v1/models."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "moe-prism"
    max_model_len: int
    full_budget: int
    default_k_min: int
    has_chat_template: bool


class ModelList(BaseModel):
    """Body of /v1/models."""

    object: str = "list"
    data: list[ModelCard]


class OperatingPointsReply(BaseModel):
    """Body of /v1/operating_points; ``measured`` is the checkpoint's operating_points.json, or null."""

    full_budget: int
    named: dict[str, int]
    measured: dict[str, Any] | None


class Status(BaseModel):
    """Body of /health and /ready."""

    status: str


async def beside(request: Request, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of ``work``; on another thread if the body is so long that tokenising it would hold up the others."""
    if int(request.headers.get("content-length", _LONG_BODY)) < _LONG_BODY:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


def create_app(model: ServedModel, engine: Engine, limits: ServerLimits) -> FastAPI:
    """The ASGI application; ``app.state.bridge`` is its bridge to the engine."""
    metrics = Metrics(model.name, model.full_budget)
    if model.blocks is not None:
        metrics.watch_blocks(model.blocks)
    bridge = Bridge(engine, metrics, limits.max_waiting)
    answering = Answering(model, bridge)
    page = page_html()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        bridge.start()
        yield
        await bridge.stop()

    # The pages that FastAPI would serve at /docs load scripts from elsewhere.
    app = FastAPI(
        title="moe-prism", version="1", lifespan=lifespan, docs_url=None, redoc_url=None,
        responses={"4XX": {"model": ErrorReply}, "5XX": {"model": ErrorReply}},
    )  # fmt: skip
    app.state.bridge = bridge
    app.add_middleware(Guard, api_key=limits.api_key, max_body=limits.max_body)
    install(app, allowed)

    stream: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}

    @app.post("/v1/completions", responses=stream, response_class=JSONResponse)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        job = await beside(request, completion_job, model, body, time.monotonic())
        return await answering.answer(request, job, body)

    @app.post("/v1/chat/completions", responses=stream, response_class=JSONResponse)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        job = await beside(request, chat_job, model, body, time.monotonic())
        return await answering.answer(request, job, body)

    card = ModelCard(
        id=model.name,
        created=model.created,
        max_model_len=model.context,
        full_budget=model.full_budget,
        default_k_min=model.k_min,
        has_chat_template=getattr(model.tokenizer, "chat_template", None) is not None,
    )

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> ModelCard:
        if name != model.name:
            raise ApiError(404, f"no model {name[:100]!r} here; this server has {model.name!r}", code="model_not_found")
        return card

    @app.get("/v1/operating_points")
    async def operating_points() -> OperatingPointsReply:
        measured = None if model.points is None else model.points.model_dump(mode="json")
        return OperatingPointsReply(full_budget=model.full_budget, named=model.named, measured=measured)

    @app.get("/health")
    async def health() -> Status:
        if not bridge.alive:
            raise ApiError(503, "the engine's thread has ended; restart the server")
        return Status(status="ok")

    @app.get("/ready")
    async def ready() -> Status:
        if not bridge.ready:
            raise ApiError(503, "the server takes no new requests; it is shutting down")
        return Status(status="ready")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=PROMETHEUS)

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": PAGE_POLICY})

    return app

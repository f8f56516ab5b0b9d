"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``, whatever went wrong.

Knows nothing of engines or of what a request asks for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ..errors import PrismError

logger = logging.getLogger("moe_prism.serving")


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """Every answer with a status of 400 or above."""

    error: ErrorBody


class ApiError(HTTPException):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: names the value, the allowed range and the way out.
        param: field of the request that is at fault.
        code: machine-readable reason.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """As JSON."""
        body = ErrorBody(message=self.detail, type=_type(self.status_code), param=self.param, code=self.code)
        return {"error": body.model_dump()}

    def response(self) -> JSONResponse:
        """As the answer to send."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def _type(status: int) -> str:
    if status == 401:
        return "authentication_error"
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"


def of_validation(errors: Sequence[Any], allowed: Callable[[str], str]) -> ApiError:
    """The first of pydantic's errors.

    Args:
        errors: as pydantic lists them.
        allowed: name of a field -> what it may be, or "".
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    # names of a union's branches look like "str", "list[...]" and "constrained-str"
    path = [str(part) for part in first["loc"] if part != "body" and str(part).replace("_", "").isalnum()]
    if path[-1:] in (["str"], ["int"]) and first["type"] != "extra_forbidden":
        path.pop()
    field = next((part for part in reversed(path) if not part.isdigit()), None)
    param = None if field is None else ".".join(path[: path.index(field) + 1])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown field; leave it out (docs/serving.md lists the fields)"
    elif first["type"] == "missing":
        message = "this field is needed"
    else:
        message = allowed(field or "") or message
        if isinstance(first.get("input"), str | int | float | None):
            message = f"{message}; got {str(first['input'])[:100]!r}"
    return ApiError(400, f"{param or 'body'}: {message}", param=param)


def install(app: FastAPI, allowed: Callable[[str], str]) -> None:
    """Answer every exception of the application's routes in OpenAI's shape.

    Args:
        app: the application.
        allowed: name of a field -> what it may be, or "".
    """

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error.errors(), allowed).response()

    @app.exception_handler(PrismError)
    async def _prism(_: Request, error: PrismError) -> JSONResponse:
        return ApiError(400, str(error)).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error, ApiError):
            return error.response()
        message = f"{request.method} {request.url.path}: {error.detail}"
        return ApiError(error.status_code, message, headers=dict(error.headers or {})).response()

    @app.exception_handler(Exception)
    async def _unexpected(_: Request, error: Exception) -> JSONResponse:
        logger.exception("a request failed", exc_info=error)
        return ApiError(500, "the server failed on this request; its log has the reason").response()

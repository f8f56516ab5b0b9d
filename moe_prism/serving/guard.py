"""What is checked before a request is read: the API key and the size of the body.

Plain ASGI, so that streams pass through untouched. Knows nothing of what a body says.
"""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError


class Guard:
    """Middleware.

    Args:
        app: what is guarded.
        api_key: needed for every path below /v1/; None: no key.
        max_body: bytes of a body.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_body: int) -> None:
        self._app = app
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 401 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        error = self._refusal(scope["path"], headers)
        if error is not None:
            await error.response()(scope, receive, send)
            return
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_body:
                raise self._too_large()
            return message

        await self._app(scope, limited, send)

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if self._key is not None and path.startswith("/v1/"):
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._key):
                return ApiError(
                    401,
                    "the API key is missing or wrong; send it as `Authorization: Bearer KEY`",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body:
            return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"the body must not exceed {self._max_body} bytes; shorten the prompt", headers={"Connection": "close"}
        )

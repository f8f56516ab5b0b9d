"""Sockets and signals: uvicorn around the application, and a drain when the process is asked to end.

Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import signal
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import PrismError
from .bridge import Bridge


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT it goes on listening, answers new requests 503, and ends when the running ones have.

    A second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, bridge: Bridge, drain_seconds: float) -> None:
        super().__init__(config)
        self._bridge = bridge
        self._drain_seconds = drain_seconds
        self._draining: asyncio.Task[None] | None = None
        self._asked = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn in the main thread, which runs the event loop."""
        if self._asked or not self.started:
            super().handle_exit(sig, frame)
        self._asked = True

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second."""
        if self._asked and self._draining is None:
            self._draining = asyncio.create_task(self._drain())
        return await super().on_tick(counter)

    async def _drain(self) -> None:
        await self._bridge.drain(self._drain_seconds)
        self.should_exit = True


def run(app: FastAPI, host: str, port: int, drain_seconds: float) -> None:
    """Serve until a signal ends it.

    Raises:
        PrismError: the address cannot be had.
    """
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=5, server_header=False
    )
    try:
        socket = config.bind_socket()
    except SystemExit:
        raise PrismError(f"cannot listen on {host}:{port}; is it taken? Name another with --host and --port") from None
    server = DrainingServer(config, app.state.bridge, drain_seconds)
    # uvicorn raises the signal again once it has ended; that it was obeyed is not a failure
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        server.run(sockets=[socket])
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])

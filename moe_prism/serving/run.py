"""Sockets and signals: uvicorn around the application, and a drain when the process is asked to end.

Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ..errors import PrismError
from .bridge import Bridge

# Longer than clients keep idle connections (OpenAI's: 5 seconds), so that they are the ones who close them: a request
# on a connection that the server is just closing is lost.
KEEP_ALIVE_SECONDS = 75
SWITCH_SECONDS = 2e-4


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT it goes on listening, answers new requests 503, and ends when the running ones have.

    A second signal does not wait for them.
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


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens as soon as the server runs; before, connections are refused.

    Raises:
        PrismError: the address cannot be had.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        raise PrismError(f"cannot listen on {host}:{port} ({error}); name another with --host and --port") from None
    return taken


def run(app: FastAPI, taken: socket.socket, drain_seconds: float, ready: Callable[[], None]) -> None:
    """Serve until a signal ends it; ``ready`` is called once requests are taken."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=5,
    )
    server = DrainingServer(config, app.state.bridge, drain_seconds)

    async def serve() -> None:
        serving = asyncio.create_task(server.serve([taken]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            ready()
        await serving

    # While a thread holds the interpreter's lock, others ask for it after this long: the engine's thread does after
    # every kernel, and the default (5 ms) is longer than its step.
    sys.setswitchinterval(SWITCH_SECONDS)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(serve())

"""A real server on a tiny elastic model, in a thread or in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn
from openai import OpenAI
from transformers import AutoTokenizer

from moe_prism.engine import Engine
from moe_prism.serving.app import ServerLimits, create_app
from moe_prism.serving.bridge import Bridge
from moe_prism.serving.load import EngineOptions, load
from moe_prism.serving.run import KEEP_ALIVE_SECONDS, bind

ROOT = Path(__file__).parents[2]
NAME = "tiny"
OPTIONS = EngineOptions(max_running=32, memory_tokens=8192, k_min=4)


@dataclass
class Live:
    url: str
    engine: Engine
    bridge: Bridge

    def client(self, **how: Any) -> OpenAI:
        return OpenAI(**({"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 60} | how))


@contextmanager
def live_server(
    checkpoint: Path,
    limits: ServerLimits | None = None,
    options: EngineOptions = OPTIONS,
    change: Callable[[Engine], None] = lambda _: None,
) -> Iterator[Live]:
    """The application under uvicorn in a thread; ``change`` may put faults into the engine first."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model, engine = load(checkpoint, tokenizer, NAME, options, dtype=torch.float32, verify=False)
    change(engine)
    app = create_app(model, engine, limits or ServerLimits())
    with bind("127.0.0.1", 0) as taken:
        server = uvicorn.Server(
            uvicorn.Config(app, log_level="error", timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=2)
        )
        thread = threading.Thread(target=server.run, args=([taken],), daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield Live(f"http://127.0.0.1:{taken.getsockname()[1]}", engine, app.state.bridge)
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive()


@contextmanager
def served(checkpoint: Path, *args: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``moe-prism serve`` in a process; gives its address."""
    command = [sys.executable, "-c", "from moe_prism.cli import main; main()", "serve", str(checkpoint), "--port", "0"]
    process = subprocess.Popen([*command, "--name", NAME, *args], stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        yield address(process), process
    finally:
        process.kill()
        process.wait(20)
        assert process.stderr is not None
        process.stderr.close()


def address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"serving \S+ at (http\S+)", line):
            return found[1]
    raise AssertionError(f"the server ended with code {process.wait()} before it served")


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)

"""``vllm serve`` in processes of its own. Knows nothing of what is asked of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serving(config: Path, options: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """The address of a server that answers; it ends with the context.

    Args:
        config: of ``--config``; the server's log lies beside it.
        options: more of the command line.
        environment: instead of this process's.

    Raises:
        RuntimeError: it did not start; with the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", "--config", str(config)]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    address, written = f"http://127.0.0.1:{port}", config.with_suffix(".log")
    with written.open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            _wait(process, f"{address}/health", written)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    for _ in range(300):
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"vllm serve did not start:\n{log.read_text()[-4000:]}")

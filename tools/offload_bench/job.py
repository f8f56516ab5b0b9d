"""What a measured process is asked and what it answers.

Runs under the Python of every engine, so it needs the standard library only. Knows nothing of engines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """One process of one engine.

    Attributes:
        engine: name in the result.
        model: a packed checkpoint, the folder of accelerate's files, or a GGUF file.
        memory: bytes of the whole process.
        routing: file of a ``Routing``.
        k_active: budget, in the units of the model's own N.
        tokens: that are timed.
        warmup: tokens before them whose use of blocks fills the cache.
        rule: of eviction.
        read_ahead: whether blocks are read ahead.
        readers: threads that read.
        threads: that compute.
        shadow: share of the blocks' memory for their copy at 4 bits; None: no copy.
        k_stored: of the budget, what runs as stored; None: all of it, or what a deadline allows.
        options: what is only for one engine.
    """

    engine: str
    model: str
    memory: int
    routing: str
    k_active: int
    tokens: int
    warmup: int
    rule: str = "lru"
    read_ahead: bool = False
    readers: int = 3
    threads: int = 2
    shadow: float | None = None
    k_stored: int | None = None
    options: dict[str, Any] | None = None


def disk_bytes() -> int:
    """Bytes that this process has had read from the disk so far: the page cache does not count."""
    counted = Path("/proc/self/io").read_text()
    return int(next(line.split()[1] for line in counted.splitlines() if line.startswith("read_bytes:")))


def peak_rss() -> int:
    """The most memory that this process has had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def run_worker(measure: Callable[[Job], dict[str, Any]]) -> None:
    """``main`` of a measured process: job file in, result file out."""
    job_file, result_file = map(Path, sys.argv[1:])
    result_file.write_text(json.dumps(measure(Job(**json.loads(job_file.read_text())))))

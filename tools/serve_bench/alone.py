"""The engine without a server: the same requests, so many at a time, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_prism.scheduling.outcomes import Job


def alone(checkpoint: Path, jobs: Sequence[Job], prompts: Sequence[Sequence[int]], at_once: int) -> float:
    """Tokens a second of a closed loop on the engine alone, as the server builds it."""
    work = [
        {"k_min": j.request.k_min, "k_active": j.request.k_active, "tokens": j.output_tokens, "prompt": list(p)}
        for j, p in zip(jobs, prompts, strict=True)
    ]
    asked = json.dumps({"checkpoint": str(checkpoint), "at_once": at_once, "work": work})
    done = subprocess.run([sys.executable, __file__], input=asked, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["tokens_per_s"])


def main() -> None:
    """Read the work from stdin, run it twice (the first time to warm up), print tokens a second of the second time."""
    from moe_prism.cli.console import compute_dtype, load_tokenizer, quiet
    from moe_prism.serving.load import EngineOptions, load

    asked = json.load(sys.stdin)
    quiet()
    path = asked["checkpoint"]
    _, engine = load(
        Path(path), load_tokenizer(path), "alone", EngineOptions(), dtype=compute_dtype("auto"), verify=False
    )
    run(engine, asked["work"][: asked["at_once"]], asked["at_once"], "w")
    began = time.perf_counter()
    tokens = run(engine, asked["work"], asked["at_once"], "r")
    print(json.dumps({"tokens_per_s": tokens / (time.perf_counter() - began)}))


def run(engine: Any, work: Sequence[dict[str, Any]], at_once: int, prefix: str) -> int:
    """Submit the next request when one ends; returns tokens generated."""
    from moe_prism.engine import Generation, TokenEvent
    from moe_prism.scheduling import Request

    todo = list(enumerate(work))[::-1]
    running = tokens = 0
    while todo or running:
        while todo and running < at_once:
            i, one = todo.pop()
            request = Request(
                f"{prefix}{i}", engine.clock(), len(one["prompt"]), one["tokens"], one["k_min"], one["k_active"]
            )
            engine.submit(Generation(request, one["prompt"]))
            running += 1
        for event in engine.step():
            if not isinstance(event, TokenEvent):
                raise RuntimeError(event.error)
            tokens += 1
            running -= event.finished is not None
    return tokens


if __name__ == "__main__":
    main()

"""What one timed process gets and gives back, and the loop that times its steps.

Runs under the Python of every engine, so it needs the standard library and NumPy only. Knows nothing of engines.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

LONGEST = 512  # tokens of a sequence, for engines that must know before


@dataclass(frozen=True)
class Job:
    """One process of one engine.

    Attributes:
        engine: name in the result.
        model: directory, or GGUF file.
        points: (tokens in a step, k_active) to time, in this order.
        threads: for computing.
        prompt: tokens in the cache before the first step.
        warmup: steps before the timed ones.
        steps: timed steps.
        vocabulary: size, of which tokens are drawn.
        seed: of the tokens.
        logits: file for the logits of the check.
        compiled: vLLM alone: let it compile the model.
    """

    engine: str
    model: str
    points: list[tuple[int, int]]
    threads: int
    prompt: int
    warmup: int
    steps: int
    vocabulary: int
    seed: int
    logits: str
    compiled: bool = False

    def rows(self, tokens: int) -> list[list[int]]:
        """Token ids of every sequence, prompt and steps: the same for all engines.

        They are drawn, not generated, so that no engine can settle in a loop that asks for the same experts.
        """
        length = self.prompt + self.warmup + self.steps
        return [
            [rng.randrange(self.vocabulary) for _ in range(length)]
            for rng in (random.Random(f"{self.seed} {row}") for row in range(tokens))
        ]


def time_steps(step: Callable[[int], None], job: Job) -> list[float]:
    """Milliseconds of every timed step; ``step`` is called with the position of the token it feeds."""
    times = []
    for number in range(job.warmup + job.steps):
        start = time.perf_counter()
        step(job.prompt + number)
        times.append(1000 * (time.perf_counter() - start))
    return times[job.warmup :]


class Decoder(Protocol):
    """A batch of sequences whose logits are tensors of torch."""

    def feed(self, start: int, end: int) -> Any:
        """Run tokens ``start:end`` of every row; logits ``[B, V]`` of the last."""


def time_decoder(decoder: Decoder, job: Job) -> list[float]:
    """The same for steps of a decoder; the prompt runs before, untimed."""
    decoder.feed(0, job.prompt)

    def step(position: int) -> None:
        # Every engine picks the likeliest token in the timed part, and then gets the next one of its row.
        decoder.feed(position, position + 1).argmax(dim=-1)

    return time_steps(step, job)


def save_logits(job: Job, logits: NDArray[np.float32]) -> None:
    """Logits ``[V]`` of the last token of row 0's prompt, for the comparison of engines."""
    np.save(job.logits, np.asarray(logits, np.float32).reshape(job.vocabulary))


def run_worker(measure: Callable[[Job], dict[str, Any]]) -> None:
    """``main`` of a timed process: job file in, result file out; engines may print what they like."""
    job_file, result_file = map(Path, sys.argv[1:])
    raw = json.loads(job_file.read_text())
    job = Job(**raw | {"points": [tuple(point) for point in raw["points"]]})
    result_file.write_text(json.dumps(measure(job)))


def job_json(job: Job) -> str:
    """What ``run_worker`` reads."""
    return json.dumps(asdict(job))

"""Requests to simulate or to send: Poisson arrivals with a mix of floors, and recorded traces.

A trace is a CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens, as the Azure LLM inference traces
(2023) have them. Traces say nothing of quality: floors and objectives are drawn from a stated ``Mix``, with a seed.
Knows no texts.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from ..errors import PrismError
from .outcomes import Job
from .requests import Request


@dataclass(frozen=True)
class Mix:
    """Floors and objectives of a workload's requests.

    Attributes:
        full_budget: k * N; every request wants this.
        floors: shares of it, each in (0, 1].
        weights: how likely each floor is.
        ttft_ms, tpot_ms: objectives of every request, or None.
    """

    full_budget: int
    floors: Sequence[float] = (0.25, 0.5, 1.0)
    weights: Sequence[float] = (0.4, 0.4, 0.2)
    ttft_ms: float | None = 1000.0
    tpot_ms: float | None = 100.0

    def __post_init__(self) -> None:
        if len(self.floors) != len(self.weights) or not self.floors:
            raise PrismError(f"a mix needs one weight per floor, got {self.floors} and {self.weights}")
        if any(not 0 < floor <= 1 for floor in self.floors):
            raise PrismError(f"floors are shares of full budget in (0, 1], got {list(self.floors)}")
        if any(not 0 <= weight < math.inf for weight in self.weights) or not sum(self.weights) > 0:
            raise PrismError(f"weights of floors must not be negative, nor all zero, got {self.weights}")

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        """Floors of ``count`` requests, in sub-experts."""
        shares = rng.choice(np.array(self.floors), size=count, p=np.array(self.weights) / sum(self.weights))
        return [max(1, round(float(share) * self.full_budget)) for share in shares]


def jobs_of(
    arrivals: Sequence[float], prompts: Sequence[int], outputs: Sequence[int], mix: Mix, seed: int
) -> list[Job]:
    """Jobs from arrival times in seconds and lengths in tokens, all of the same length, sorted by arrival."""
    floors = mix.draw(len(arrivals), np.random.default_rng((seed, 1)))
    return [
        Job(
            Request(f"r{i}", float(at), int(prompt), int(out), floor, mix.full_budget, mix.ttft_ms, mix.tpot_ms),
            int(out),
        )
        for i, (at, prompt, out, floor) in enumerate(zip(arrivals, prompts, outputs, floors, strict=True))
    ]


def poisson(rate: float, seconds: float, lengths: Sequence[tuple[int, int]], mix: Mix, seed: int) -> list[Job]:
    """Poisson arrivals.

    Args:
        rate: requests a second.
        seconds: how long they come.
        lengths: (prompt, output) tokens to draw from.
        mix: floors and objectives.
        seed: of arrivals, lengths and floors.
    """
    if not rate > 0 or not seconds > 0 or not lengths:
        raise PrismError(
            f"rate and seconds must be above 0 and lengths not empty, got {rate}, {seconds} and {len(lengths)} lengths"
        )
    rng = np.random.default_rng((seed, 0))
    count = int(rng.poisson(rate * seconds))
    arrivals = np.sort(rng.uniform(0, seconds, count))
    chosen = rng.integers(0, len(lengths), count)
    pairs = [lengths[i] for i in chosen.tolist()]
    return jobs_of(arrivals.tolist(), [p for p, _ in pairs], [o for _, o in pairs], mix, seed)


@dataclass(frozen=True)
class Trace:
    """A recorded workload: seconds since its first request, and tokens of prompt and output."""

    arrivals: list[float]
    prompts: list[int]
    outputs: list[int]

    def scaled(self, *, time: float = 1.0, length: float = 1.0, first: int | None = None) -> Trace:
        """Its first requests, with times multiplied by ``time`` and lengths by ``length`` (at least one token).

        Raises:
            PrismError: a scale that is not above 0, or no request left.
        """
        if first is not None and first < 1:
            raise PrismError(f"at least 1 request of a trace is needed, got {first}")
        if not time > 0 or not length > 0:
            raise PrismError(f"scales must be above 0, got time {time} and length {length}")
        return Trace(
            [at * time for at in self.arrivals[:first]],
            [max(1, round(p * length)) for p in self.prompts[:first]],
            [max(1, round(o * length)) for o in self.outputs[:first]],
        )

    @staticmethod
    def read(path: Path) -> Trace:
        """Read a CSV file; raises PrismError that names the line of the first bad value."""
        try:
            with path.open(newline="", encoding="utf-8") as lines:
                return _parse(csv.DictReader(lines), str(path))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise PrismError(f"trace {path} cannot be read: {error}") from None


def _parse(rows: csv.DictReader[str], name: str) -> Trace:
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    missing = [column for column in columns if column not in (rows.fieldnames or ())]
    if missing:
        found = ", ".join(rows.fieldnames or ()) or "none"
        raise PrismError(f"trace {name} has no column {', '.join(missing)}; it has {found}")
    arrivals: list[float] = []
    prompts: list[int] = []
    outputs: list[int] = []
    start: datetime | None = None
    for row in rows:
        where = f"trace {name}, line {rows.line_num}"
        try:
            at = datetime.fromisoformat((row["TIMESTAMP"] or "").strip()[:26])
            prompt, output = int(row["ContextTokens"] or ""), int(row["GeneratedTokens"] or "")
        except ValueError:
            raise PrismError(f"{where}: needs a time and two whole numbers, got {list(row.values())}") from None
        if prompt < 1 or output < 1:
            raise PrismError(f"{where}: tokens must be 1 or more, got {prompt} and {output}")
        start = start or at
        if (at.tzinfo is None) != (start.tzinfo is None):
            raise PrismError(f"{where}: {row['TIMESTAMP']} and the first line must both name a time zone, or none")
        seconds = (at - start).total_seconds()
        if arrivals and seconds < arrivals[-1]:
            raise PrismError(f"{where}: its time {row['TIMESTAMP']} is before the line in front; sort the trace")
        arrivals.append(seconds)
        prompts.append(prompt)
        outputs.append(output)
    if not arrivals:
        raise PrismError(f"trace {name} has no requests")
    return Trace(arrivals, prompts, outputs)

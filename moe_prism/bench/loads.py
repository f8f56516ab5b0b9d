"""The workloads on which policies are compared: Poisson arrivals at three loads, and a recorded trace.

Loads are multiples of what the original model can sustain on the same engine, so that "high" means the same on every
machine: requests a second that continuous batching at full budget serves when everything waits from the start. Knows no
engine: an engine measures its own capacity and passes it in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..errors import PrismError
from ..scheduling.admission import Admission
from ..scheduling.cost_model import CostModel
from ..scheduling.outcomes import Job
from ..scheduling.policies import POLICIES
from ..scheduling.simulator import simulate
from ..scheduling.workloads import Mix, Trace, jobs_of, poisson

LOADS = {"low": 0.3, "medium": 0.7, "high": 1.5}
TRACE_LOAD = 1.5
SATURATION = 256  # requests that wait from the start where capacity is found


class Load(NamedTuple):
    """One workload.

    Attributes:
        name: e.g. "high" or "trace".
        share: offered load over what full budget can sustain.
        jobs: sorted by arrival.
    """

    name: str
    share: float
    jobs: list[Job]


@dataclass(frozen=True)
class Plan:
    """What is compared on what.

    Attributes:
        mix: floors and objectives.
        lengths: (prompt, output) tokens that Poisson workloads draw from.
        loads: name -> multiple of the capacity of full budget.
        seconds: how long Poisson arrivals come.
        trace: replayed open loop, or None.
        trace_load: mean load of the trace, the same multiple; its times are scaled to it.
        seed: of arrivals, lengths and floors.
    """

    mix: Mix
    lengths: Sequence[tuple[int, int]]
    loads: dict[str, float]
    seconds: float = 300.0
    trace: Trace | None = None
    trace_load: float = TRACE_LOAD
    seed: int = 0

    def __post_init__(self) -> None:
        for name, share in {**self.loads, "trace": self.trace_load}.items():
            if not 0 < share < float("inf"):
                raise PrismError(f"load {name} must be above 0 (1 is what full budget can sustain), got {share}")
        if not self.seconds > 0:
            raise PrismError(f"seconds must be above 0, got {self.seconds}")

    def build(self, capacity: float, trace_capacity: float | None = None) -> list[Load]:
        """All workloads.

        Args:
            capacity: requests a second that full budget sustains with ``lengths``.
            trace_capacity: the same with the trace's lengths; needed where there is a trace.
        """
        found = [
            Load(name, share, poisson(share * capacity, self.seconds, self.lengths, self.mix, self.seed))
            for name, share in self.loads.items()
        ]
        if self.trace is not None:
            if trace_capacity is None:
                raise PrismError("a trace needs the capacity with its lengths")
            found.append(Load("trace", self.trace_load, self._replay(self.trace, self.trace_load * trace_capacity)))
        return found

    def _replay(self, trace: Trace, rate: float) -> list[Job]:
        span = trace.arrivals[-1]
        if not span > 0:
            raise PrismError("a trace needs requests at two different times at least; all of these came at once")
        scaled = trace.scaled(time=len(trace.arrivals) / rate / span)
        return jobs_of(scaled.arrivals, scaled.prompts, scaled.outputs, self.mix, self.seed)


def saturating(lengths: Sequence[tuple[int, int]], mix: Mix, seed: int) -> list[Job]:
    """Jobs that all wait from the start, without objectives: how fast they are served is an engine's capacity."""
    drawn = np.random.default_rng((seed, 2)).integers(0, len(lengths), SATURATION)
    chosen = [lengths[i] for i in drawn.tolist()]
    free = replace(mix, ttft_ms=None, tpot_ms=None)
    return jobs_of([0.0] * SATURATION, [p for p, _ in chosen], [o for _, o in chosen], free, seed)


def capacity(
    lengths: Sequence[tuple[int, int]], mix: Mix, cost: CostModel, admission: Admission, replicas: int, seed: int
) -> float:
    """Requests a second that simulated replicas sustain with everyone at full budget."""
    policy = POLICIES.create("system-only", {"cost": cost, "ttft_ms": 1e9, "tpot_ms": 1e9, "patience": 1e9})
    found = simulate(saturating(lengths, mix, seed), policy, cost, admission)
    return replicas * SATURATION / found.seconds

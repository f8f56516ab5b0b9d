"""Time of the scheduler itself: one plan of every policy, and a simulated request over 1 to 1,000 replicas.

    python tools/bench_scheduler.py --trace ../shared/data/traces/azure-llm-2023-conv.csv --out scheduler.json

Costs are made up (the sizes of OLMoE-1B-7B at N = 8), which changes no policy's work. One thread; CPU time, which is
wall time on an idle core.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from moe_prism.bench.loads import capacity
from moe_prism.errors import PrismError
from moe_prism.evaluation.environment import versions
from moe_prism.scheduling import POLICIES, Admission, CostModel, Limits, Request, Running, State
from moe_prism.scheduling.simulator import simulate
from moe_prism.scheduling.step_load import TERMS
from moe_prism.scheduling.workloads import Mix, Trace, jobs_of

FULL, SUB_EXPERTS = 64, 512
RUNNING, WAITING = 256, 1000
REPEATS = 10
REPLICAS = (1, 10, 100, 1000)
SECONDS = {
    "step": 4e-3,
    "prefill_step": 2e-3,
    "decode_step": 2e-3,
    "prefill_tokens": 1e-5,
    "prefill_work": 3e-5,
    "decode_tokens": 2e-5,
    "decode_work": 1e-4,
    "touched": 2e-2,
    "context": 2e-8,
    "gated": 1e-3,
    "gated_tokens": 1e-6,
}
COST = CostModel(tuple(SECONDS.get(term, 0.0) for term in TERMS), FULL, SUB_EXPERTS)


def states(rng: np.random.Generator, count: int, places: int) -> list[State]:
    """Engines with 256 running and 1,000 waiting requests."""

    def request(name: str, arrival: float) -> Request:
        floor = int(rng.choice([16, 32, 64]))
        prompt, most = int(rng.integers(20, 2000)), int(rng.integers(16, 512))
        return Request(name, arrival, prompt, most, floor, FULL, 1000.0, 100.0, int(rng.integers(0, 3)))

    found = []
    for _ in range(count):
        running = []
        for i in range(RUNNING):
            asked = request(f"r{i}", float(rng.uniform(0, 20)))
            generated = int(rng.integers(1, asked.max_tokens + 1))
            running.append(
                Running(asked, asked.prompt_tokens, generated, 30 - generated * 0.09, int(rng.integers(1, 64)))
            )
        waiting = [request(f"w{i}", float(at)) for i, at in enumerate(np.sort(rng.uniform(22, 30, WAITING)))]
        found.append(State(waiting, running, Limits(FULL, places), 7))
    return found


def plan_times(tries: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a plan by policy; batch policies plan their launch, with nothing running."""
    found = {}
    for name in sorted(POLICIES):
        policy = POLICIES.create(name, {"cost": COST})
        for label, places in (("no place free", RUNNING), ("64 places free", RUNNING + 64)):
            taken = []
            for state in states(np.random.default_rng(0), tries, places):
                if "continuous" not in name and "system" not in name:
                    state = State(state.waiting, [], state.limits)
                policy.plan(state, 30.0)  # an engine has seen most of its requests in the step before
                for _ in range(REPEATS):
                    begun = time.process_time()
                    policy.plan(state, 30.0)
                    taken.append((time.process_time() - begun) * 1e3)
            quartiles = np.percentile(taken, (25, 50, 75))
            found[f"{name}, {label}"] = dict(zip(("p25", "p50", "p75"), map(float, quartiles), strict=True))
    return found


def simulations(trace: Trace, requests: int, per_replica: int, repeat: int) -> list[dict[str, float]]:
    """Seconds of simulating the trace, repeated up to the wanted number of requests, at the load of full budget."""
    mix = Mix(FULL)
    admission = Admission(COST, Limits(FULL, 64))
    lengths = list(zip(trace.prompts, trace.outputs, strict=True))
    each = capacity(lengths, mix, COST, admission, 1, 0)
    found = []
    for replicas, count in [(n, per_replica * n) for n in REPLICAS] + [(100, requests)]:
        rounds = -(-count // len(trace.arrivals))
        span = trace.arrivals[-1] + trace.arrivals[-1] / len(trace.arrivals)
        arrivals = [at + i * span for i in range(rounds) for at in trace.arrivals][:count]
        scale = count / (each * replicas) / arrivals[-1]
        prompts, outputs = (trace.prompts * rounds)[:count], (trace.outputs * rounds)[:count]
        jobs = jobs_of([at * scale for at in arrivals], prompts, outputs, mix, 0)
        begun = time.process_time()
        done = simulate(
            jobs, POLICIES.create("continuous", {"cost": COST}), COST, admission, replicas=replicas, repeat=repeat
        )
        seconds = time.process_time() - begun
        found.append(
            {
                "replicas": replicas,
                "requests": count,
                "seconds": seconds,
                "ms_a_request": seconds / count * 1e3,
                "steps_a_request": done.steps / count,
                "simulated_seconds": done.seconds,
            }
        )
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> int:
    """Run and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument("--tries", type=int, default=40, help="states that are planned")
    parser.add_argument("--requests", type=int, default=100_000, help="of the large simulation, over 100 replicas")
    parser.add_argument("--per-replica", type=int, default=100, help="requests of the simulations of 1 to 1,000")
    parser.add_argument("--repeat", type=int, default=16, help="steps for which a plan holds while nothing changes")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        trace = Trace.read(args.trace)
        record = {
            "versions": versions(),
            "cost": SECONDS,
            "full_budget": FULL,
            "running": RUNNING,
            "waiting": WAITING,
            "repeat": args.repeat,
            "plan_ms": plan_times(args.tries),
        }
        for name, row in record["plan_ms"].items():
            print(f"{name:32} {row['p50']:.3f} ms ({row['p25']:.3f} to {row['p75']:.3f})", flush=True)
        record["simulations"] = simulations(trace, args.requests, args.per_replica, args.repeat)
    except PrismError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

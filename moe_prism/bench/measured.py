"""Every policy on every workload on the real engine: requests come open loop, the same ones for every policy.

The simulator runs the same requests over the same cost model beside it. Policies take turns, and the order is reversed
in every second round, so that a machine that slows down favours none. Every run is kept when it ends, so that an
interrupted comparison goes on. Knows nothing of the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from ..engine import Engine
from ..engine.identity import ENGINE, machine_of
from ..evaluation.environment import versions
from ..scheduling import Admission, Job, Limits, Outcome, Policy
from ..scheduling.cost_model import CostModel
from ..scheduling.policies import POLICIES
from ..scheduling.simulator import simulate
from ..scheduling.summary import summarise
from .loads import Load, Plan, saturating
from .open_loop import serve_jobs
from .partial import Partial
from .results import kl_of, results
from .scenario import Scenario, plan_of, points_of, policies_of, runs_on

Progress = Callable[[str, int, int], None]
BASELINES = ("fifo", "full-batch", "virtual-queues")
COMPARED = ("throughput_rps", "ttft_ms", "tpot_ms")  # of the simulator with the engine
BUDGETS = ("prompt_budgets", "token_budgets")
KEPT = ("admitted", "first_token", "finished", "prefilled", "tokens", "budget", *BUDGETS)  # of an outcome


def run_measurement(
    scenario: Scenario,
    model: PreTrainedModel,
    cost: CostModel,
    rounds: int,
    progress: Progress | None = None,
    partial: Path | None = None,
) -> dict[str, Any]:
    """The record of ``results``, with the simulator's figures beside the engine's and the targets.

    Args:
        scenario: what is compared; one replica.
        model: elastic, as it was profiled.
        cost: of this machine.
        rounds: times that everything is run, with other seeds; outcomes are pooled.
        progress: called with (load and policy, requests ended, in all).
        partial: file of the runs so far, see ``Partial``.
    """
    plan = plan_of(scenario, cost.full_budget)
    longest = max(p + o for p, o in plan.lengths)
    memory = scenario.memory_tokens or scenario.max_running * longest
    limits = Limits(cost.full_budget, scenario.max_running, memory, scenario.max_prefill)
    admission = Admission(cost, limits, scenario.hopeless)
    policies = policies_of(scenario, cost)
    engine = Engine(model, next(iter(policies.values())), limits, hopeless=scenario.hopeless)
    vocabulary = int(model.config.get_text_config().vocab_size)
    options = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(scenario).items()}
    identity = {"machine": machine_of(model), "checkpoint": cost.checkpoint, "cost": cost.coefficients}
    kept = Partial(partial, {"scenario": options, "rounds": rounds, **identity})
    if "capacity" not in kept:
        kept["capacity"] = _capacity(engine, plan, cost, vocabulary, progress)
    sustained = float(kept["capacity"])
    if plan.trace is not None:
        first = max(2, round(plan.trace_load * sustained * plan.seconds))
        plan = replace(plan, trace=plan.trace.scaled(first=first))
    pooled: dict[tuple[str, str], list[_Ran]] = {}
    simulated: dict[tuple[str, str], list[tuple[list[Outcome], float]]] = {}
    loads: list[Load] = []
    for turn in range(rounds):
        loads = replace(plan, seed=plan.seed + turn).build(sustained, sustained)
        for load in loads:
            for name, policy in list(policies.items())[:: -1 if turn % 2 else 1]:
                if not runs_on(scenario, name, load.name):
                    continue
                key = f"{turn}, {load.name}, {name}"
                if key not in kept:
                    kept[key] = _run(engine, load, name, policy, vocabulary, plan.seed + turn, progress).record()
                pooled.setdefault((load.name, name), []).append(_Ran.of(kept[key], load.jobs))
                beside = simulate(load.jobs, policy, cost, admission)
                simulated.setdefault((load.name, name), []).append((beside.outcomes, beside.seconds))
    kl = kl_of(points_of(scenario))
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    beside_figures: dict[str, dict[str, dict[str, Any]]] = {}
    for (load_name, name), runs in pooled.items():
        outcomes = [outcome for run in runs for outcome in run.outcomes]
        record = summarise(outcomes, sum(run.seconds for run in runs), kl)
        record["policy_ms_per_step"] = float(np.mean([run.policy_ms for run in runs]))
        figures.setdefault(load_name, {})[name] = record
        others = simulated[load_name, name]
        outcomes = [outcome for other in others for outcome in other[0]]
        beside_figures.setdefault(load_name, {})[name] = summarise(outcomes, sum(other[1] for other in others), kl)
    about = {
        **options,
        "rounds": rounds,
        "full_budget": cost.full_budget,
        "capacity_rps": sustained,
        "memory_tokens": memory,
        "engine": ENGINE,
        "machine": machine_of(model),
        "cost_model": {"median_error": cost.median_error, "p95_error": cost.p95_error},
        "versions": versions(),
    }
    kept.finish()
    context = float(np.mean([p + o / 2 for p, o in plan.lengths]))
    record = results(about, loads, figures, cost, simulated=False, context=context)
    return {
        **record,
        "beside": beside_figures,
        "validation": _validation(figures, beside_figures),
        "targets": targets(figures),
    }


def targets(figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """What the comparison is about, as far as its loads and policies were run.

    Returns:
        ``high_throughput_ratio``: ``continuous`` over ``fifo-original``; ``high_goodput_ratio``: over the best of
        fifo, full-batch and virtual-queues; ``low_mean_kl``; ``trace_ttft_p99_ratio``: over full budget (the better
        of ``system-only`` and ``fifo-original``); ``floor_violations`` of all.
    """
    found: dict[str, float] = {}
    high, low, trace = (figures.get(load, {}) for load in ("high", "low", "trace"))
    if {"continuous", "fifo-original"} <= set(high):
        found["high_throughput_ratio"] = high["continuous"]["throughput_rps"] / high["fifo-original"]["throughput_rps"]
    goodput = [high[name]["goodput_rps"] for name in BASELINES if name in high]
    if "continuous" in high and goodput:
        found["high_goodput_ratio"] = high["continuous"]["goodput_rps"] / max(max(goodput), 1e-9)
    if "mean_kl" in low.get("continuous", {}):
        found["low_mean_kl"] = low["continuous"]["mean_kl"]
    full = [trace[name]["ttft_ms"]["p99"] for name in ("system-only", "fifo-original") if name in trace]
    if "continuous" in trace and full:
        found["trace_ttft_p99_ratio"] = trace["continuous"]["ttft_ms"]["p99"] / min(full)
    found["floor_violations"] = sum(row["floor_violations"] for load in figures.values() for row in load.values())
    return found


class _Ran(NamedTuple):
    """One policy on one load.

    Attributes:
        outcomes: in order of arrival.
        seconds: from the first arrival to the last token.
        policy_ms: of a step, spent in the policy.
    """

    outcomes: list[Outcome]
    seconds: float
    policy_ms: float

    def record(self) -> dict[str, Any]:
        """As JSON values, without the jobs."""
        outcomes = [{name: getattr(outcome, name) for name in KEPT} for outcome in self.outcomes]
        arrivals = [outcome.job.request.arrival for outcome in self.outcomes]
        return {**self._asdict(), "outcomes": outcomes, "arrivals": arrivals}

    @classmethod
    def of(cls, record: Mapping[str, Any], jobs: Sequence[Job]) -> _Ran:
        """The inverse, with the jobs that were run."""
        outcomes = []
        for values, arrival, job in zip(record["outcomes"], record["arrivals"], jobs, strict=True):
            counts = {name: {int(k): n for k, n in values[name].items()} for name in BUDGETS}
            outcomes.append(
                Outcome(replace(job, request=replace(job.request, arrival=arrival)), **{**values, **counts})
            )
        return cls(outcomes, record["seconds"], record["policy_ms"])


def _run(
    engine: Engine, load: Load, name: str, policy: Policy, vocabulary: int, seed: int, progress: Progress | None
) -> _Ran:
    engine.policy = policy
    before = engine.stats

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress(f"{load.name}, {name}", done, total)

    outcomes, seconds = serve_jobs(engine, load.jobs, vocabulary, seed, tell)
    after = engine.stats
    steps = max(1, after.steps - before.steps)
    return _Ran(outcomes, seconds, 1e3 * (after.policy_seconds - before.policy_seconds) / steps)


def _capacity(engine: Engine, plan: Plan, cost: CostModel, vocabulary: int, progress: Progress | None) -> float:
    """Requests a second at full budget and continuous batching, when everything waits from the start."""
    policy = POLICIES.create("system-only", {"cost": cost, "ttft_ms": 1e9, "tpot_ms": 1e9, "patience": 1e9})
    jobs = saturating(plan.lengths, plan.mix, plan.seed)[: 4 * engine.limits.max_running]
    ran = _run(engine, Load("capacity", 1.0, jobs), "full budget", policy, vocabulary, plan.seed, progress)
    return len(ran.outcomes) / ran.seconds


def _validation(
    measured: Mapping[str, Mapping[str, Mapping[str, Any]]], beside: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, dict[str, dict[str, float]]]:
    """Load -> policy -> figure -> simulated over measured, less one."""

    def flat(record: Mapping[str, Any]) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in COMPARED:
            values = record[name] if isinstance(record[name], Mapping) else {"": record[name]}
            found |= {f"{name} {part}".strip(): float(value) for part, value in values.items()}
        return found

    return {
        load: {
            name: {key: flat(beside[load][name])[key] / value - 1 for key, value in flat(record).items() if value}
            for name, record in rows.items()
        }
        for load, rows in measured.items()
    }

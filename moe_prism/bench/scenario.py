"""One simulated comparison from what a user names: files are read, everything is checked, then it runs.

Knows nothing of the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..checkpoint.read import open_checkpoint
from ..checkpoint.schema import OperatingPoints, parse_operating_points
from ..errors import PrismError
from ..evaluation.environment import versions
from ..scheduling.admission import Admission
from ..scheduling.cost_file import read_cost_model
from ..scheduling.cost_model import CostModel
from ..scheduling.policies import POLICIES, Policy
from ..scheduling.requests import Limits
from ..scheduling.workloads import Mix, Trace
from .loads import LOADS, TRACE_LOAD, Plan
from .results import kl_of, results
from .simulated import compare, offered

PROMPTS, OUTPUTS = (16, 256), (8, 128)  # tokens of Poisson requests where no trace is given, both ends included


@dataclass(frozen=True)
class Scenario:
    """Options of ``moe-prism simulate``; see there.

    Attributes:
        floors: shares of full budget, and the weight of each.
        policies: names; all registered ones if empty. ``NAME@LOAD+LOAD`` runs on these loads only.
        lanes: see ``scheduling.simulator.Router``.
    """

    checkpoint: Path | None = None
    cost: Path | None = None
    points: Path | None = None
    trace: Path | None = None
    policies: Sequence[str] = ()
    loads: dict[str, float] = field(default_factory=lambda: dict(LOADS))
    trace_load: float = TRACE_LOAD
    seconds: float = 300.0
    length_scale: float = 0.1
    requests: int | None = None
    floors: tuple[Sequence[float], Sequence[float]] = ((0.25, 0.5, 1.0), (0.4, 0.4, 0.2))
    ttft_ms: float = 1000.0
    tpot_ms: float = 100.0
    max_running: int = 32
    max_prefill: int | None = None
    memory_tokens: int | None = None
    hopeless: Literal["serve", "refuse"] = "serve"
    replicas: int = 1
    lanes: Sequence[int] | None = None
    repeat: int = 1
    seed: int = 0


def run_simulation(
    scenario: Scenario, progress: Callable[[str, int, int], None] | None = None
) -> tuple[dict[str, Any], CostModel]:
    """The record of ``results`` and the cost model behind it.

    Raises:
        PrismError: no cost model, an unreadable or damaged file, or an impossible value; before anything runs.
    """
    if scenario.replicas < 1 or scenario.repeat < 1:
        raise PrismError(f"replicas and repeat must be 1 or more, got {scenario.replicas} and {scenario.repeat}")
    cost = cost_of(scenario)
    points = points_of(scenario)
    if points is not None and points.full_budget != cost.full_budget:
        raise PrismError(
            f"the operating points are of a model with full budget {points.full_budget}, the cost model of one with "
            f"{cost.full_budget}; name files of the same checkpoint"
        )
    limits = Limits(cost.full_budget, scenario.max_running, scenario.memory_tokens, scenario.max_prefill)
    admission = Admission(cost, limits, scenario.hopeless)
    policies = policies_of(scenario, cost)
    plan = plan_of(scenario, cost.full_budget)
    loads = offered(plan, cost, admission, scenario.replicas)
    options: dict[str, Any] = {"replicas": scenario.replicas, "lanes": scenario.lanes, "repeat": scenario.repeat}
    wanted = {load.name: {n: p for n, p in policies.items() if runs_on(scenario, n, load.name)} for load in loads}
    figures = compare(loads, wanted, cost, admission, kl=kl_of(points), progress=progress, **options)
    lengths = np.array(plan.lengths, dtype=float)
    about = {
        **{name: str(value) if isinstance(value, Path) else value for name, value in asdict(scenario).items()},
        "full_budget": cost.full_budget,
        "engine": cost.engine,
        "machine": cost.machine,
        "kl": None if points is None else f"measured on {points.text}, {points.tokens} tokens",
        "versions": versions(),
    }
    context = float(lengths[:, 0].mean() + lengths[:, 1].mean() / 2)
    return results(about, loads, figures, cost, simulated=True, context=context), cost


def cost_of(scenario: Scenario) -> CostModel:
    """The cost model that was named, wherever it was measured."""
    source = scenario.cost or scenario.checkpoint
    if source is None:
        raise PrismError("a simulation needs a cost model: name a checkpoint that has one, or a file with --cost")
    return read_cost_model(source)


def points_of(scenario: Scenario) -> OperatingPoints | None:
    """The measured quality that was named, if any."""
    if scenario.points is not None:
        try:
            return parse_operating_points(scenario.points.read_bytes())
        except OSError as error:
            raise PrismError(f"operating points {scenario.points} cannot be read: {error}") from None
    if scenario.checkpoint is not None:
        return open_checkpoint(scenario.checkpoint, verify=False).operating_points()
    return None


def policies_of(scenario: Scenario, cost: CostModel) -> dict[str, Policy]:
    """Objectives of the workload are those of its requests, so policies keep their own defaults.

    Raises:
        PrismError: an unknown policy, or one on a load that is not there.
    """
    there = {*scenario.loads, *(("trace",) if scenario.trace else ())}
    for asked in scenario.policies:
        unknown = set(_loads_of(asked)) - there
        if unknown:
            raise PrismError(
                f"policy {asked!r} is to run on {', '.join(unknown)}; loads are {', '.join(sorted(there))}"
            )
    wanted = dict.fromkeys(asked.partition("@")[0] for asked in scenario.policies)
    return {name: POLICIES.create(name, {"cost": cost}) for name in wanted or sorted(POLICIES)}


def runs_on(scenario: Scenario, name: str, load: str) -> bool:
    """Whether a policy is to run on a load."""
    mine = [_loads_of(asked) for asked in scenario.policies if asked.partition("@")[0] == name]
    return not mine or any(not loads or load in loads for loads in mine)


def _loads_of(asked: str) -> list[str]:
    return [load for load in asked.partition("@")[2].split("+") if load]


def plan_of(scenario: Scenario, full_budget: int) -> Plan:
    """The workloads, before they are scaled to a capacity."""
    mix = Mix(full_budget, *scenario.floors, scenario.ttft_ms, scenario.tpot_ms)
    trace = None
    if scenario.trace is not None:
        trace = Trace.read(scenario.trace).scaled(length=scenario.length_scale, first=scenario.requests)
        lengths = list(zip(trace.prompts, trace.outputs, strict=True))
    else:
        rng = np.random.default_rng((scenario.seed, 3))
        drawn = rng.integers((PROMPTS[0], OUTPUTS[0]), (PROMPTS[1] + 1, OUTPUTS[1] + 1), (1000, 2))
        lengths = [(prompt, output) for prompt, output in drawn.tolist()]
    return Plan(mix, lengths, scenario.loads, scenario.seconds, trace, scenario.trace_load, scenario.seed)

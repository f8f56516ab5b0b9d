"""Every policy on every workload, simulated: the same requests, the same cost model, one policy after the other.

Knows nothing of files or of printing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..scheduling.admission import Admission
from ..scheduling.cost_model import CostModel
from ..scheduling.policies import Policy
from ..scheduling.simulator import simulate
from ..scheduling.summary import summarise
from .loads import Load, Plan, capacity


def offered(plan: Plan, cost: CostModel, admission: Admission, replicas: int = 1) -> list[Load]:
    """The plan's workloads at multiples of what these replicas sustain at full budget."""

    def sustained(lengths: Sequence[tuple[int, int]]) -> float:
        return capacity(lengths, plan.mix, cost, admission, replicas, plan.seed)

    trace = plan.trace
    of_trace = None if trace is None else sustained(list(zip(trace.prompts, trace.outputs, strict=True)))
    return plan.build(sustained(plan.lengths), of_trace)


def compare(
    loads: Sequence[Load],
    policies: Mapping[str, Mapping[str, Policy]],
    cost: CostModel,
    admission: Admission,
    *,
    kl: Mapping[int, float] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Load -> policy -> figures.

    Args:
        loads: what is offered.
        policies: load -> name -> policy.
        cost: what a step takes.
        admission: limits, and what happens to hopeless objectives.
        kl: see ``summarise``.
        progress: called with (load and policy, requests ended, in all).
        options: of ``simulate``: replicas, lanes, repeat.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for load in loads:
        for name, policy in policies[load.name].items():

            def tell(done: int, total: int, stage: str = f"{load.name}, {name}") -> None:
                if progress is not None:
                    progress(stage, done, total)

            done = simulate(load.jobs, policy, cost, admission, progress=tell, **options)
            figures = summarise(done.outcomes, done.seconds, kl)
            found.setdefault(load.name, {})[name] = {**figures, "busy": done.busy, "steps": done.steps}
            tell(len(load.jobs), len(load.jobs))
    return found

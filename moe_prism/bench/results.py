"""Results of policies side by side as JSON: the same shape from the simulator and from an engine.

    {"version": 1, "simulated": true, "about": {...}, "loads": {LOAD: {"share", "requests", "rate_rps",
     "policies": {POLICY: figures of ``scheduling.summary``}}}, "curves": [{"batch", "k_active", "step_ms",
     "tokens_per_s"}]}

Knows nothing of how they came about.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import replace_file
from ..checkpoint.schema import OperatingPoints
from ..errors import PrismError
from ..scheduling.cost_model import CostModel
from .loads import Load

VERSION = 1
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def results(
    about: Mapping[str, Any],
    loads: Iterable[Load],
    figures: Mapping[str, Mapping[str, Mapping[str, Any]]],
    cost: CostModel,
    *,
    simulated: bool,
    context: float = 0.0,
) -> dict[str, Any]:
    """The record.

    Args:
        about: seed, versions, machine, limits, mix: whatever is needed to run it again.
        loads: what was offered.
        figures: load -> policy -> figures.
        cost: for the curves over (k, batch), in which every request has ``context`` tokens.
        simulated: by a cost model, not by an engine.
        context: tokens of every request in the curves.
    """
    offered = {}
    for load in loads:
        if load.name not in figures:
            continue
        span = load.jobs[-1].request.arrival - load.jobs[0].request.arrival if load.jobs else 0.0
        offered[load.name] = {
            "share": load.share,
            "requests": len(load.jobs),
            "rate_rps": len(load.jobs) / span if span else None,
            "policies": {name: dict(record) for name, record in figures[load.name].items()},
        }
    return {
        "version": VERSION,
        "simulated": simulated,
        "about": dict(about),
        "loads": offered,
        "curves": curves(cost, context),
    }


def curves(cost: CostModel, context: float) -> list[dict[str, float]]:
    """C(batch, k) over the batch at an eighth, a quarter, half, three quarters and all of full budget."""
    full = cost.full_budget
    budgets = sorted({max(1, round(full * share)) for share in (0.125, 0.25, 0.5, 0.75, 1.0)})
    found = []
    for k, batch in ((k, batch) for k in budgets for batch in BATCHES):
        seconds = cost.table(batch, k, context)
        found.append({"batch": batch, "k_active": k, "step_ms": seconds * 1e3, "tokens_per_s": batch / seconds})
    return found


def kl_of(points: OperatingPoints | None) -> dict[int, float] | None:
    """Budget -> measured KL to the full model in nats; full budget, which is the model, counts as measured."""
    if points is None:
        return None
    return {point.k_active: max(0.0, point.kl) for point in points.elastic} | {points.full_budget: 0.0}


def write_results(path: Path, record: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step; NaN becomes null.

    Raises:
        PrismError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, (json.dumps(_plain(record), indent=1, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise PrismError(f"results cannot be written to {path} ({error}); name another place") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

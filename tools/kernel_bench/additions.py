"""What every addition to a plain budget costs in time: gates, recalibration, shared budgets, skipped neurons, ladder.

One elastic layer of the bench's shape at half budget, with made-up tensors of the right sizes: their values decide what
runs, and how much of it only where tokens share. The gates' own work, and whatever else a token at half budget does, is
in the times; so an addition that saves less than it costs shows as a ratio above 1 to the plain static order. Knows
nothing of quality.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from moe_prism.elastic.compensation import Compensation, OutputScale, Recalibration, Renormalisation
from moe_prism.elastic.dial import Dial, spread_table
from moe_prism.elastic.ladder import LadderPlan, rung_within
from moe_prism.elastic.layer import ElasticLayer, elastic_experts
from moe_prism.elastic.plan import Plan
from moe_prism.elastic.sharing import Sharing
from moe_prism.experts.shadow import make_shadow
from moe_prism.gates import GATES

FITTED = 8
PLAIN = "static order"
_BLOCK = 64
BLOCKS = f"gate-first, blocks of {_BLOCK}"
Step = tuple[Tensor, Tensor, Tensor]


class Sizes(NamedTuple):
    """Of the layer: experts E, neurons C of an expert, hidden H, routed k, sub-experts N."""

    experts: int
    neurons: int
    hidden: int
    top_k: int
    n: int


def cases(module: nn.Module, sizes: Sizes, seed: int) -> dict[str, Callable[[Step], Tensor]]:
    """Addition -> the layer's forward at half budget with it."""
    rng = torch.Generator().manual_seed(seed)
    full = sizes.top_k * sizes.n
    half, size = full // 2, sizes.neurons // sizes.n
    importance = torch.rand(sizes.experts, sizes.n, generator=rng)
    fitted = [max(1, full * (i + 1) // (FITTED + 1)) for i in range(FITTED)]

    def vectors(rows: int) -> Tensor:
        return torch.randn(FITTED, rows, sizes.hidden, generator=rng)

    def layer(gate: str = "static", tensors: dict[str, Tensor] | None = None, **more: Any) -> ElasticLayer:
        dial = Dial(full)
        dial.executor, dial.k_active = "auto", half
        tensors = {"importance": importance} if tensors is None else tensors
        return ElasticLayer("bench", dial, GATES.create(gate, {}), tensors, sizes.n, **more)

    def recalibrated(recalibration: Recalibration) -> ElasticLayer:
        return layer(compensation=recalibration)

    scale = torch.rand(sizes.experts, sizes.neurons, generator=rng)
    norms = torch.rand(sizes.experts, sizes.neurons, generator=rng)
    found = {
        PLAIN: layer(),
        "compensated": recalibrated(Compensation(vectors(sizes.experts), fitted, full)),
        "scaled": recalibrated(OutputScale(vectors(2), fitted, full)),
        "renormalised": recalibrated(Renormalisation()),
        "gate linear": layer("linear", {"rows": torch.randn(sizes.experts, sizes.n, sizes.hidden, generator=rng)}),
        "gate proxy": layer("proxy", {}),
        "gate probe": layer("probe", {"down_norms": norms}),
        "spread over layers": layer(),
        "shared by tokens": layer(thresholds=torch.linspace(1, 0, full + 1)),
        "gate-first": layer(neuron_scale=scale),
        BLOCKS: layer(neuron_scale=scale),
        "ladder": layer(neuron_scale=scale, shadow=make_shadow(module)),
    }
    found["spread over layers"].dial.spread = spread_table([[k] for k in range(1, full + 1)])
    found["shared by tokens"].dial.sharing = Sharing([1.0] * full, layers=1)
    scan = [min(full, 2 * k) for k in range(1, full + 1)]
    found["gate-first"].dial.plan = Plan(scan, size)
    found[BLOCKS].dial.plan = Plan(scan, size, _BLOCK)
    rungs = [rung_within(k, full, size, 0.25) for k in range(1, full)]
    found["ladder"].dial.plan = LadderPlan(rungs, size)

    def forward(state: ElasticLayer) -> Callable[[Step], Tensor]:
        def run(step: Step) -> Tensor:
            if state.dial.sharing is not None:  # every token is a request of its own, as in a decode step
                state.dial.fill([float(half)] * len(step[0]), range(len(step[0])))
            with _attached(module, state):
                return elastic_experts(module, *step)

        return run

    return {name: forward(state) for name, state in found.items()}


@contextmanager
def _attached(module: nn.Module, state: ElasticLayer) -> Any:
    before = module.__dict__["_moe_prism"]
    module.__dict__["_moe_prism"] = state
    try:
        yield
    finally:
        module.__dict__["_moe_prism"] = before


def measure(
    module: nn.Module,
    sizes: Sizes,
    make_step: Callable[[int], Step],
    tokens: list[int],
    rounds: int,
    steps: int,
    seed: int,
) -> list[dict[str, Any]]:
    """One line per addition and number of tokens: ms, quartiles, and over the plain order's, all in turns."""
    taken: dict[tuple[int, str], list[float]] = {}
    forwards = cases(module, sizes, seed)
    for turn in range(rounds + 1):  # the first one compiles
        for count in tokens:
            for name, forward in forwards.items():
                for i in range(1 + steps):  # the first call comes from another case
                    step = make_step(count)
                    begin = time.perf_counter()
                    forward(step)
                    if turn and i:
                        taken.setdefault((count, name), []).append((time.perf_counter() - begin) * 1e3)
    found = []
    for (count, name), values in taken.items():
        low, mid, high = (round(float(v), 3) for v in np.percentile(values, (25, 50, 75)))
        over = mid / float(np.median(taken[count, PLAIN]))
        found.append(
            {"tokens": count, "addition": name, "ms": mid, "ms_spread": [low, high], "over_static": round(over, 2)}
        )
    return found

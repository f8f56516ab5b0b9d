"""vLLM's CPU kernel and ours on whole experts and on sub-experts, at full budget and below, without an engine.

    VLLM_PYTHON tools/vllm_bench/kernel.py --out build/bench/vllm_kernel.json

Layers take turns, as in a step, so that weights come from memory and not from a cache. Columns: ``experts`` is vLLM's
own layout; ``sub_experts`` the same kernel on sub-experts, at several budgets; ``mixed`` tokens of random budgets from
a quarter up, a call for each budget and padded; ``panels`` our kernel, of bfloat16 only, at the same budgets and mixed.
Ways take turns as well.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from moe_prism.waiting import brief_waiting

os.environ.update(brief_waiting())  # before torch

import numpy as np
import torch
from libraries import restart_with_them
from torch import Tensor
from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

from moe_prism.elastic.executors.panels import Panels, PanelsExecutor, panels_suit, run_whole
from moe_prism.elastic.selection import Selection
from moe_prism.evaluation.environment import cpu_name, usable_cores, versions
from moe_prism.vllm_plugin.cpu_kernel import PADDED, VirtualExperts, all_sub_experts, padded_calls
from moe_prism.vllm_plugin.stacked import StackedExperts

LAYERS, EXPERTS, HIDDEN, NEURONS, TOP_K, N = 4, 32, 1024, 512, 8, 4
FULL = TOP_K * N
BUDGETS = (FULL // 2, FULL * 9 // 32)


class Layer(NamedTuple):
    """The same random experts in every layout."""

    whole: tuple[Tensor, Tensor]
    virtual: VirtualExperts
    module: StackedExperts


class Work(NamedTuple):
    """What one layer is given: tokens, their routing, and selections of sub-experts by name."""

    x: Tensor
    weights: Tensor
    index: Tensor
    selections: dict[str, Selection]


Way = Callable[[Layer, Work], Tensor]


def layer(dtype: torch.dtype) -> Layer:
    """Random weights."""
    gate_up = (torch.randn(EXPERTS, 2 * NEURONS, HIDDEN) * 0.03).to(dtype)
    down = (torch.randn(EXPERTS, HIDDEN, NEURONS) * 0.03).to(dtype)
    module = StackedExperts(torch.empty(0), torch.empty(0))
    if panels_suit(dtype, HIDDEN, NEURONS, N):
        module.panels = Panels.of(gate_up, down, N)
    whole = cpu_prepack_moe_weight(gate_up, "vec"), cpu_prepack_moe_weight(down, "vec")
    return Layer(whole, VirtualExperts.of(gate_up, down, N, "vec"), module)


def work(dtype: torch.dtype, tokens: int, rng: np.random.Generator) -> Work:
    """Random tokens, routing and selections."""
    weights, index = torch.rand(tokens, TOP_K), torch.rand(tokens, EXPERTS).topk(TOP_K).indices.int()
    every, ids = all_sub_experts(weights, index, N)
    kinds = {str(k): np.full(tokens, k) for k in (FULL, *BUDGETS)}
    kinds["mixed"] = rng.integers(FULL // 4, FULL, tokens)
    selections = {}
    for name, budgets in kinds.items():
        token = np.repeat(np.arange(tokens), budgets)
        place = np.concatenate([rng.permutation(FULL)[:k] for k in budgets])
        chosen = ids.numpy()[token, place].astype(np.int64)
        order = np.lexsort((token, chosen))
        parts = token, place // N, chosen, every.numpy()[token, place]
        selections[name] = Selection(*(torch.from_numpy(part[order]) for part in parts))
    return Work(torch.randn(tokens, HIDDEN).to(dtype), weights, index, selections)


def experts(layer: Layer, work: Work) -> Tensor:
    """vLLM's own way."""
    out = torch.empty_like(work.x)
    cpu_fused_moe(out, work.x, *layer.whole, None, None, work.weights, work.index, "silu", "vec")
    return out


def sub_experts(name: str, most: float) -> Way:
    """vLLM's kernel on sub-experts; ``most`` of ``padded_calls``."""

    def run(layer: Layer, work: Work) -> Tensor:
        chosen = work.selections[name]
        pairs = chosen.token.numpy(), chosen.sub_expert.numpy(), chosen.weight.numpy()
        out = torch.zeros_like(work.x)
        for call in padded_calls(*pairs, len(work.x), most):
            mine = torch.from_numpy(call.rows)
            ids = torch.from_numpy(call.ids)
            out[mine] = layer.virtual.run(work.x[mine], torch.from_numpy(call.weights), ids)
        return out

    return run


def panels(name: str) -> Way:
    """Our kernel on the same sub-experts."""
    executor = PanelsExecutor()
    return lambda layer, work: executor.run(layer.module, work.x, work.selections[name], N)


def whole_panels(layer: Layer, work: Work) -> Tensor:
    """Our kernel at full budget, as the plugin calls it."""
    assert layer.module.panels is not None  # this way is for layers that have them
    return run_whole(layer.module.panels, work.x, work.index, work.weights)


@torch.inference_mode()
def rows(dtype: torch.dtype, tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row per number of tokens: milliseconds of a layer, medians."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    layers = [layer(dtype) for _ in range(LAYERS)]
    ways: dict[tuple[str, str], Way] = {("experts", str(FULL)): experts}
    ways |= {("sub_experts", name): sub_experts(name, PADDED) for name in map(str, (FULL, *BUDGETS))}
    ways |= {("mixed", "a_call_a_budget"): sub_experts("mixed", 1.0), ("mixed", "padded"): sub_experts("mixed", PADDED)}
    if layers[0].module.panels is not None:
        ways |= {("panels", str(FULL)): whole_panels}
        ways |= {("panels", name): panels(name) for name in (*map(str, BUDGETS), "mixed")}
    found = []
    for count in tokens:
        given = [work(dtype, count, rng) for _ in range(LAYERS)]
        times: dict[tuple[str, str], list[float]] = {name: [] for name in ways}
        for turn in range(6 if count > 100 else 16):
            for name, way in ways.items():
                began = time.perf_counter()
                for one, mine in zip(layers, given, strict=True):
                    way(one, mine)
                if turn:  # the first warms up
                    times[name].append(1e3 * (time.perf_counter() - began) / LAYERS)
        row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "tokens": count}
        for (column, name), each in times.items():
            row.setdefault(column, {})[name] = round(median(each), 3)
        print(json.dumps(row), flush=True)
        found.append(row)
    return found


def main() -> None:
    """Parse the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = rows(torch.bfloat16, (1, 2, 4, 8, 16, 32, 128, 256)) + rows(torch.float32, (1, 8, 32, 128))
    shape = {
        "layers": LAYERS,
        "experts": EXPERTS,
        "hidden": HIDDEN,
        "neurons": NEURONS,
        "top_k": TOP_K,
        "num_sub_experts": N,
    }
    record = {
        "machine": {"cpu": cpu_name(), "cores": usable_cores(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "shape": shape,
        "unit": "milliseconds, median",
        "rows": found,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    restart_with_them()
    main()

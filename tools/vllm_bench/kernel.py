"""vLLM's CPU kernel on whole experts and on sub-experts, at full budget and below; one layer, without an engine.

    VLLM_PYTHON tools/vllm_bench/kernel.py --out build/bench/vllm_kernel.json

Columns: ``experts`` is vLLM's own layout; ``sub_experts`` the plugin's, at several budgets; ``a_pair_a_row`` the same
with a token repeated for each of its sub-experts, which any mix of budgets could share; ``mixed`` tokens of random
budgets from a quarter up, a call for each budget and as the plugin calls; ``ours`` our own CPU kernels at full budget.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch import Tensor
from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

from moe_prism.elastic.cpu_selection import select_all
from moe_prism.elastic.executors import EXECUTORS
from moe_prism.evaluation.environment import cpu_name, usable_cores, versions
from moe_prism.experts.packing import pack
from moe_prism.vllm_plugin.cpu_kernel import PADDED, VirtualExperts, all_sub_experts, padded_calls
from moe_prism.vllm_plugin.stacked import StackedExperts

EXPERTS, HIDDEN, NEURONS, TOP_K, N = 64, 1024, 512, 8, 4
FULL = TOP_K * N
BUDGETS = (FULL, FULL // 2, FULL * 9 // 32)


def milliseconds(run: Callable[[], Tensor], times: int) -> float:
    """Median of some calls, after two."""
    run(), run()
    found = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        found.append(1e3 * (time.perf_counter() - began))
    return median(found)


@torch.inference_mode()
def rows(dtype: torch.dtype, tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """One row per number of tokens."""
    torch.manual_seed(0)
    gate_up = (torch.randn(EXPERTS, 2 * NEURONS, HIDDEN) * 0.03).to(dtype)
    down = (torch.randn(EXPERTS, HIDDEN, NEURONS) * 0.03).to(dtype)
    whole = cpu_prepack_moe_weight(gate_up, "vec"), cpu_prepack_moe_weight(down, "vec")
    virtual = VirtualExperts.of(gate_up, down, N, "vec")
    ours, cpu = StackedExperts(gate_up, down.clone()), EXECUTORS.create("cpu")
    pack(ours)
    found = []
    for count in tokens:
        x, weights = torch.randn(count, HIDDEN).to(dtype), torch.rand(count, TOP_K)
        index = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(count)])
        every, ids = all_sub_experts(weights, index, N)
        routed = index.int()
        out, everything, times = torch.empty_like(x), select_all(weights, index), 5 if count > 100 else 15

        def experts(x: Tensor = x, out: Tensor = out, weights: Tensor = weights, routed: Tensor = routed) -> Tensor:
            cpu_fused_moe(out, x, *whole, None, None, weights, routed, "silu", "vec")
            return out

        def sub_experts(k: int, x: Tensor = x, every: Tensor = every, ids: Tensor = ids) -> Callable[[], Tensor]:
            some, mine = every[:, :k].contiguous(), ids[:, :k].contiguous()
            return lambda: virtual.run(x, some, mine)

        def a_pair_a_row(k: int, x: Tensor = x, every: Tensor = every, ids: Tensor = ids) -> Callable[[], Tensor]:
            some, mine = every[:, :k].reshape(-1, 1).contiguous(), ids[:, :k].reshape(-1, 1).contiguous()
            token = torch.arange(len(x)).repeat_interleave(k)
            return lambda: torch.zeros(x.shape).index_add_(0, token, virtual.run(x[token], some, mine).float())

        row: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "tokens": count}
        row["experts"] = milliseconds(experts, times)
        row["sub_experts"] = {k: milliseconds(sub_experts(k), times) for k in BUDGETS}
        row["a_pair_a_row"] = {k: milliseconds(a_pair_a_row(k), times) for k in BUDGETS}
        row["mixed"] = mixed(virtual, x, every, ids, times)
        row["ours"] = milliseconds(lambda x=x, all=everything: cpu.run(ours, x, all, 1), times)
        print(json.dumps(row), flush=True)
        found.append(row)
    return found


def mixed(virtual: VirtualExperts, x: Tensor, every: Tensor, ids: Tensor, times: int) -> dict[str, float]:
    """Tokens of random budgets below full."""
    rng = np.random.default_rng(0)
    budgets = rng.integers(FULL // 4, FULL, len(x))
    token = np.repeat(np.arange(len(x)), budgets)
    place = np.concatenate([rng.permutation(FULL)[:k] for k in budgets])
    pairs = token, ids.numpy()[token, place], every.numpy()[token, place]

    def run(most: float) -> Tensor:
        out = torch.zeros_like(x)
        for call in padded_calls(*pairs, len(x), most):
            mine = torch.from_numpy(call.rows)
            out[mine] = virtual.run(x[mine], torch.from_numpy(call.weights), torch.from_numpy(call.ids))
        return out

    return {
        "a_call_a_budget": milliseconds(lambda: run(1.0), times),  # nothing is repeated
        "as_the_plugin": milliseconds(lambda: run(PADDED), times),
    }


def main() -> None:
    """Parse the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found = [row for dtype in (torch.bfloat16, torch.float32) for row in rows(dtype, (1, 8, 32, 128, 256))]
    shape = {"experts": EXPERTS, "hidden": HIDDEN, "neurons": NEURONS, "top_k": TOP_K, "num_sub_experts": N}
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
    main()

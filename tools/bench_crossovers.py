"""From how many tokens on another way of computing wins: the numbers in executors/choice.py and linear.py.

    python tools/bench_crossovers.py --out build/bench/crossovers.json
    make bench-crossovers

The questions: a linear layer, of 2,048 x 2,048 and smaller: our row kernel or torch's product, by tokens; an MoE
layer of 16 experts of 512 neurons and hidden 1,024, top-4, N = 4, at half budget: work in proportion to the selection
(executor cpu) or large products with the rest set to zero (masked), by routed tokens per expert. The same where all
sub-experts are looked at and half of the neurons kept (gate-first). Where the CPU has products of bfloat16 pairs, also
panels: a linear layer in them or torch's product, and the MoE layer in them or ``cpu``. Both ways take turns inside
one process, with fresh inputs, in bfloat16 and fp32; a ratio is that of two neighbouring calls, its median and
quartiles are given. The weights of a call were not used by the call before it, so that they come from memory, as in a
model of many layers (those of the smaller linear layers fit in caches, as they do in a small model).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_prism.checkpoint.atomic import replace_file
from moe_prism.elastic.cpu_selection import select
from moe_prism.elastic.executors import EXECUTORS, NeuronRule
from moe_prism.elastic.executors.panels import PANELS, Panels
from moe_prism.elastic.executors.rows import as_rows, from_rows
from moe_prism.elastic.kernels import multiply_rows
from moe_prism.elastic.kernels.dots import has_products_of_pairs
from moe_prism.elastic.kernels.linear_panels import linear_panels
from moe_prism.elastic.linear import LinearPanels
from moe_prism.evaluation.environment import machine, versions
from moe_prism.experts import find_expert_layers
from moe_prism.experts.packing import pack

LINEAR_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKENS_PER_EXPERT = (1, 2, 4, 8, 16, 32, 64, 128, 256)
COPIES = 24  # of the linear layer: together larger than any cache
SHAPE = {"hidden_size": 1024, "intermediate_size": 512, "num_experts": 16, "num_experts_per_tok": 4}
N = 4

Pair = tuple[Callable[[int], Any], Callable[[int], Any]]


def linear(dtype: torch.dtype, tokens: int, rng: torch.Generator, size: int = 2048) -> Pair:
    """(ours, torch's), called with the turn."""
    weights = [torch.randn(size, size, generator=rng).to(dtype) for _ in range(COPIES)]
    x = torch.randn(tokens, size, generator=rng).to(dtype)
    token, starts, zero = np.arange(tokens), np.array([0, tokens]), np.zeros(1, np.int64)

    def ours(turn: int) -> torch.Tensor:
        out = torch.empty(tokens, size)
        rows = as_rows(weights[turn % COPIES])
        multiply_rows(rows, x.float().numpy(), token, starts, zero, 1, 0, size, out.numpy())
        return out.to(dtype)

    return ours, lambda turn: torch.nn.functional.linear(x, weights[turn % COPIES])


def linear_in_panels(dtype: torch.dtype, tokens: int, rng: torch.Generator, size: int = 2048) -> Pair:
    """(panels, torch's)."""
    weights = [torch.randn(size, size, generator=rng).to(dtype) for _ in range(COPIES)]
    panels = [LinearPanels.of(weight, None) for weight in weights]
    x = torch.randn(tokens, size, generator=rng).to(dtype)

    def ours(turn: int) -> torch.Tensor:
        mine = panels[turn % COPIES]
        return from_rows(linear_panels(mine.weight, as_rows(x), mine.bias), x)

    return ours, lambda turn: torch.nn.functional.linear(x, weights[turn % COPIES])


def experts(dtype: torch.dtype, per_expert: int, rng: torch.Generator, what: str = "parts") -> Pair:
    """(cpu, masked), of half the sub-experts or of half the neurons; or (panels, cpu)."""
    layers = []
    for _ in range(3):
        config = AutoConfig.for_model("olmoe", vocab_size=64, num_hidden_layers=1, num_attention_heads=8, **SHAPE)
        module = find_expert_layers(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())[0].module
        for parameter in module.parameters():
            parameter.requires_grad_(False).normal_(std=0.02, generator=rng)
        if what == "panels":
            module.panels = Panels.of(module.gate_up_proj, module.down_proj, N)
        pack(module)
        layers.append(module)
    neurons = what == "neurons"
    k, e = SHAPE["num_experts_per_tok"], SHAPE["num_experts"]
    tokens = per_expert * e // k
    x = torch.randn(tokens, SHAPE["hidden_size"], generator=rng).to(dtype)
    weights, index = torch.rand(tokens, e, generator=rng).topk(k, dim=1)
    scores = torch.rand(tokens, k, N, generator=rng)
    chosen = select(scores, weights, index, torch.full((tokens,), k * N if neurons else k * N // 2), True)
    cpu, masked = EXECUTORS.create("cpu"), EXECUTORS.create("masked")
    if neurons:
        scale = torch.rand(e, SHAPE["intermediate_size"], generator=rng)
        rule = NeuronRule(scale, torch.full((tokens,), k * SHAPE["intermediate_size"] // 2))
        return (
            lambda turn: cpu.run_some(layers[turn % 3], x, chosen, N, rule),
            lambda turn: masked.run_some(layers[turn % 3], x, chosen, N, rule),
        )
    first, second = (EXECUTORS.create(PANELS), cpu) if what == "panels" else (cpu, masked)
    return lambda turn: first.run(layers[turn % 3], x, chosen, N), lambda turn: second.run(
        layers[turn % 3], x, chosen, N
    )


def ratio(pair: Pair, turns: int) -> dict[str, float | list[float]]:
    """Time of the second way over that of the first: above 1 the first one wins."""
    times: tuple[list[float], list[float]] = ([], [])
    with torch.inference_mode():
        for turn in range(turns + 2):
            for way, taken in zip(pair, times, strict=True):
                begin = time.perf_counter()
                way(turn)
                taken.append(time.perf_counter() - begin)
    first, second = (np.array(taken[2:]) for taken in times)
    low, mid, high = np.percentile(second / first, (25, 50, 75))
    return {
        "first_ms": round(float(np.median(first)) * 1e3, 3),
        "second_ms": round(float(np.median(second)) * 1e3, 3),
        "ratio": round(float(mid), 2),
        "ratio_spread": [round(float(low), 2), round(float(high), 2)],
    }


QUESTIONS: dict[str, tuple[Callable[[torch.dtype, int, torch.Generator], Pair], tuple[int, ...]]] = {
    "linear": (linear, LINEAR_TOKENS),
    "linear 1024": (partial(linear, size=1024), LINEAR_TOKENS[:6]),
    "linear 384": (partial(linear, size=384), LINEAR_TOKENS[:6]),
    "experts": (experts, TOKENS_PER_EXPERT),
    "neurons": (partial(experts, what="neurons"), TOKENS_PER_EXPERT),
    "linear panels": (linear_in_panels, LINEAR_TOKENS),
    "linear panels 1024": (partial(linear_in_panels, size=1024), LINEAR_TOKENS),
    "linear panels 256": (partial(linear_in_panels, size=256), LINEAR_TOKENS),
    "experts panels": (partial(experts, what="panels"), TOKENS_PER_EXPERT),
}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=[*QUESTIONS], help="one question only, beside the answers that are there")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/bench/crossovers.json"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    rows: list[dict[str, Any]] = []
    if args.what is not None and args.out.exists():
        rows = [row for row in json.loads(args.out.read_text())["rows"] if row["what"] != args.what]
    for dtype in (torch.bfloat16, torch.float32):
        for what, (make, sizes) in QUESTIONS.items():
            runs = "panels" not in what or (dtype == torch.bfloat16 and has_products_of_pairs())
            for size in sizes if runs and args.what in (None, what) else ():
                rng = torch.Generator().manual_seed(args.seed)
                found = ratio(make(dtype, size, rng), args.turns)
                rows.append({"what": what, "dtype": str(dtype).removeprefix("torch."), "tokens": size, **found})
                print(rows[-1], file=sys.stderr, flush=True)
    tiny = AutoConfig.for_model("olmoe", vocab_size=8, hidden_size=32, num_attention_heads=1, num_hidden_layers=1)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "threads": args.threads,
        "machine": {
            **machine(AutoModelForCausalLM.from_config(tiny)),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": versions(),
        "rows": rows,
    }
    replace_file(args.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

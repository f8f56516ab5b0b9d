"""Time of one MoE layer at every budget, by executor, beside the machine's reading bandwidth.

    python tools/bench_kernels.py --out build/bench/kernels.json
    make bench-kernels

One layer of OLMoE-1B-7B's shape (64 experts of 1,024 neurons, hidden 2,048, top-8, N = 4) with random bfloat16
weights, 0.8 GB, far more than any cache. Every step routes its tokens anew at random. What is timed is the
experts' forward: the static gate, selection and executor for ours (``cpu``, and ``panels`` where this CPU is faster on
them), transformers' grouped_mm for the original, in bfloat16 and, since many CPUs have no bfloat16 product, in fp32 as
well. Cases take turns inside one process; in a turn a case runs a few steps that follow each other, as the layers of a
model do, after one that is not counted. Figures are medians with quartiles. The bandwidth is that of the better of two
plain reading loops over the same weights with the same number of threads, in every round, since a shared machine
changes from minute to minute. In the end come the gates and whatever else can be added to a budget, on the last number
of threads. Knows nothing of quality.
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

import numba
import numpy as np
import torch
from kernel_bench.additions import Sizes, measure
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.moe import grouped_mm_experts_forward

from moe_prism.checkpoint.atomic import replace_file
from moe_prism.elastic.cpu_selection import select_all
from moe_prism.elastic.dial import Dial
from moe_prism.elastic.executors import EXECUTORS, NeuronRule
from moe_prism.elastic.executors.panels import PANELS
from moe_prism.elastic.executors.rows import as_rows
from moe_prism.elastic.layer import ElasticLayer, elastic_experts
from moe_prism.elastic.layout import in_huge_pages, use_panels
from moe_prism.evaluation.environment import machine, versions
from moe_prism.experts import find_expert_layers
from moe_prism.experts.packing import pack, packed_rows
from moe_prism.gates import GATES

SHAPE = {"hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8}
N = 4
FULL = 32
BUDGETS = (32, 24, 16, 9)
NEURON_SHARE = 0.25


@numba.njit(parallel=True, fastmath=True)
def read_in_turn(words: Any, threads: int) -> Any:
    """Every thread reads one run, word after word."""
    sums = np.zeros(threads)
    run = words.shape[0] // threads
    for thread in numba.prange(threads):
        part = words[thread * run : (thread + 1) * run]
        total = np.float32(0)
        for i in range(part.shape[0]):
            total += part[i]
        sums[thread] = total
    return sums


@numba.njit(parallel=True, fastmath=True)
def read_four_rows(rows: Any, threads: int) -> Any:
    """Every thread reads four rows of 4 KB at once."""
    sums = np.zeros(threads)
    run = rows.shape[0] // threads // 4 * 4
    for thread in numba.prange(threads):
        total = np.float32(0)
        for r in range(thread * run, (thread + 1) * run, 4):
            a, b, c, d = rows[r], rows[r + 1], rows[r + 2], rows[r + 3]
            for i in range(rows.shape[1]):
                total += (a[i] + b[i]) + (c[i] + d[i])
        sums[thread] = total
    return sums


def make_layer(dtype: torch.dtype, seed: int) -> torch.nn.Module:
    """Stacked experts of the shape, random."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model("olmoe", vocab_size=64, num_hidden_layers=1, num_attention_heads=16, **SHAPE)
    module = find_expert_layers(AutoModelForCausalLM.from_config(config, dtype=dtype).eval())[0].module
    for parameter in module.parameters():
        parameter.requires_grad_(False)
        for expert in parameter:  # one block of random numbers for all: their values do not matter for time
            expert.normal_(std=0.02) if expert.data_ptr() == parameter.data_ptr() else expert.copy_(parameter[0])
    return module


class Bench:
    """The layer in its forms, and what can be timed on it."""

    def __init__(self, seed: int, baselines: bool = True) -> None:
        self.ours = make_layer(torch.bfloat16, seed)
        in_huge_pages(self.ours)
        pack(self.ours)
        self.stock = make_layer(torch.bfloat16, seed) if baselines else None
        self.stock32 = make_layer(torch.float32, seed) if baselines else None
        self.dial = Dial(FULL)
        importance = torch.rand(SHAPE["num_experts"], N)
        gate = GATES.create("static", {})
        state = ElasticLayer("bench", self.dial, gate, {"importance": importance}, N)
        self.ours.__dict__["_moe_prism"] = state
        self.executors = {"cpu": self.ours}
        other = make_layer(torch.bfloat16, seed)
        in_huge_pages(other)
        if use_panels(other, N):
            other.__dict__["_moe_prism"] = state
            self.executors[PANELS] = other
        self.rng = torch.Generator().manual_seed(seed)
        self.scale = torch.rand(SHAPE["num_experts"], SHAPE["intermediate_size"], generator=self.rng)

    def step(self, tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random tokens and their routing."""
        x = torch.randn(tokens, SHAPE["hidden_size"], generator=self.rng).to(dtype)
        scores = torch.rand(tokens, SHAPE["num_experts"], generator=self.rng)
        weights, index = scores.topk(SHAPE["num_experts_per_tok"], dim=1)
        return x, index, weights / weights.sum(1, keepdim=True)

    def cases(self) -> dict[tuple[str, int], Callable[..., torch.Tensor]]:
        """(executor, budget) -> layer forward."""

        def elastic(name: str, k_active: int) -> Callable[..., torch.Tensor]:
            def forward(*step: torch.Tensor) -> torch.Tensor:
                self.dial.executor, self.dial.k_active = name, k_active
                return elastic_experts(self.executors.get(name, self.ours), *step)

            return forward

        def quarter(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            count = int(NEURON_SHARE * SHAPE["num_experts_per_tok"] * SHAPE["intermediate_size"])
            rule = NeuronRule(self.scale, count=torch.full((len(x),), count))
            return EXECUTORS.create("cpu").run_some(self.ours, x, select_all(weights, index), 1, rule)

        found: dict[tuple[str, int], Callable[..., torch.Tensor]] = {}
        for name in self.executors:
            for k_active in BUDGETS:
                found[name, k_active] = elastic(name, k_active)
        found["grouped", FULL // 2] = elastic("grouped", FULL // 2)
        found["reference", FULL // 2] = elastic("reference", FULL // 2)
        found["cpu, a quarter of the neurons", FULL] = quarter
        found["transformers grouped_mm", FULL] = lambda *step: grouped_mm_experts_forward(self.stock, *step)
        found["transformers grouped_mm fp32", FULL] = lambda *step: grouped_mm_experts_forward(self.stock32, *step)
        return found

    def bytes_read(self, index: torch.Tensor, k_active: int) -> int:
        """Weights that a step of our fast executors reads, in bytes; counted from the selection."""
        seen: list[int] = []
        run = type(EXECUTORS.create("cpu")).run

        def spy(executor: Any, module: Any, x: Any, selection: Any, n: int, computed: Any = None) -> torch.Tensor:
            seen.append(len(selection.sub_expert.unique()) * (N // n))
            return torch.zeros_like(x)

        try:
            type(EXECUTORS.create("cpu")).run = spy  # type: ignore[method-assign]
            self.dial.executor, self.dial.k_active = "cpu", k_active
            tokens = len(index)
            elastic_experts(self.ours, torch.zeros(tokens, 2048).bfloat16(), index, torch.ones(index.shape))
        finally:
            type(EXECUTORS.create("cpu")).run = run  # type: ignore[method-assign]
        return seen[0] * 3 * SHAPE["intermediate_size"] // N * SHAPE["hidden_size"] * 2


def quartiles(values: list[float]) -> dict[str, Any]:
    """Median and spread in ms."""
    low, mid, high = np.percentile(np.array(values) * 1e3, (25, 50, 75))
    return {"ms": round(float(mid), 3), "ms_spread": [round(float(low), 3), round(float(high), 3)]}


def bandwidth(bench: Bench, threads: int) -> float:
    """GB/s of the better of the two reading loops, each run twice."""
    rows = packed_rows(bench.ours)
    assert rows is not None
    words = as_rows(rows.gate_up).view(np.float32)
    numba.set_num_threads(threads)
    took = []
    for loop in 2 * (lambda: read_in_turn(words.reshape(-1), threads), lambda: read_four_rows(words, threads)):
        begin = time.perf_counter()
        loop()
        took.append(time.perf_counter() - begin)
    return words.nbytes / min(took) / 1e9


class Samples:
    """What was timed at one number of threads and tokens: seconds, and shares of the round's own bandwidth."""

    def __init__(self) -> None:
        self.times: dict[tuple[str, int], list[float]] = {}
        self.shares: dict[tuple[str, int], list[float]] = {}
        self.bytes: dict[int, list[int]] = {k: [] for k in BUDGETS}

    def round(self, bench: Bench, tokens: int, steps: int, gbs: float) -> None:
        """All cases in turn."""
        for (name, k_active), forward in bench.cases().items():
            slow = name.startswith(("transformers", "grouped", "reference"))
            dtype = torch.float32 if name.endswith("fp32") else torch.bfloat16
            inputs = [bench.step(tokens, dtype) for _ in range(1 + (1 if slow and tokens > 1 else steps))]
            times = []
            for step in inputs:
                begin = time.perf_counter()
                forward(*step)
                times.append(time.perf_counter() - begin)
            self.times.setdefault((name, k_active), []).extend(times[1:])  # the first call comes from another case
            if name in bench.executors:
                for (_, index, _), took in zip(inputs[1:], times[1:], strict=True):
                    self.bytes[k_active].append(bench.bytes_read(index, k_active))
                    share = self.bytes[k_active][-1] / took / 1e9 / gbs
                    self.shares.setdefault((name, k_active), []).append(share)

    def rows(self, tokens: int) -> list[dict[str, Any]]:
        """One row a case."""
        ms = {key: quartiles(values)["ms"] for key, values in self.times.items()}
        found = []
        for (name, k_active), values in self.times.items():
            row = {"tokens": tokens, "k_active": k_active, "executor": name, **quartiles(values)}
            row["vs_grouped_mm"] = round(ms["transformers grouped_mm", FULL] / row["ms"], 2)
            row["vs_grouped_mm_fp32"] = round(ms["transformers grouped_mm fp32", FULL] / row["ms"], 2)
            row["vs_full"] = round(row["ms"] / ms[PANELS if name == PANELS else "cpu", FULL], 3)
            if (name, k_active) in self.shares:
                row["bytes"] = int(np.mean(self.bytes[k_active]))
                row["bandwidth_share"] = round(float(np.median(self.shares[name, k_active])), 3)
            found.append(row)
        return found


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=6, help="of a case in a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/bench/kernels.json"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.seed)
    reading: dict[int, list[float]] = {threads: [] for threads in args.threads}
    samples = {(threads, tokens): Samples() for threads in args.threads for tokens in args.tokens}
    with torch.inference_mode():
        for turn in range(args.rounds + 1):
            for threads in args.threads:
                torch.set_num_threads(threads)
                for tokens in args.tokens:
                    gbs = bandwidth(bench, threads)
                    sample = samples[threads, tokens] if turn else Samples()  # the first turn compiles
                    sample.round(bench, tokens, args.steps, gbs)
                    if turn:
                        reading[threads].append(gbs)
            print(f"round {turn} of {args.rounds}", file=sys.stderr, flush=True)
    results = []
    for threads, values in reading.items():
        low, mid, high = (round(float(v), 1) for v in np.percentile(values, (25, 50, 75)))
        layer = [row for tokens in args.tokens for row in samples[threads, tokens].rows(tokens)]
        results.append({"threads": threads, "bandwidth_gbs": mid, "bandwidth_spread": [low, high], "layer": layer})
        print(f"{threads} thread(s): {mid} GB/s", *layer, sep="\n", flush=True)
    threads = args.threads[-1]
    torch.set_num_threads(threads)
    sizes = Sizes(SHAPE["num_experts"], SHAPE["intermediate_size"], SHAPE["hidden_size"], FULL // N, N)
    with torch.inference_mode():
        make_step = partial(bench.step, dtype=torch.bfloat16)
        additions = measure(bench.ours, sizes, make_step, args.tokens, args.rounds, args.steps // 2, args.seed)
    print(f"additions to half budget, {threads} thread(s)", *additions, sep="\n", flush=True)
    tiny = AutoConfig.for_model("olmoe", vocab_size=8, hidden_size=32, num_attention_heads=1, num_hidden_layers=1)
    described = machine(AutoModelForCausalLM.from_config(tiny))
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "machine": {**described, "dtype": "bfloat16", "capability": torch.backends.cpu.get_cpu_capability()},
        "versions": {**versions(), "numba": numba.__version__},
        "shape": {**SHAPE, "num_sub_experts": N},
        "runs": results,
        "additions": {"threads": threads, "k_active": FULL // 2, "rows": additions},
    }
    replace_file(args.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

"""Selection for a whole batch against plain selection: different sub-experts, time and quality of a decode step.

    python tools/bench_batch_selection.py --checkpoint build/bench/reference --text TEXT
    make bench-batch

Two parts. On an elastic checkpoint: every row of a batch is a window of the text with its cache filled at full
budget; the next tokens are forced, one step at a time, at each way of selecting, and compared with the same step at
full budget (KL in nats per token). On one layer of OLMoE-1B-7B's shape with random weights: only time and the
number of different sub-experts, since its scores mean nothing; they are drawn log-normal. Ways take turns step by
step; times are medians with quartiles. The budget is half of full, the floor a quarter; the cap is half of what plain
selection touches.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from moe_prism.waiting import brief_waiting

os.environ.update(brief_waiting())  # before torch

import torch
from bench_kernels import FULL, SHAPE, Bench, N, quartiles
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel

from moe_prism import budget, full_budget, load_elastic
from moe_prism.checkpoint.atomic import replace_file
from moe_prism.elastic import dial_of
from moe_prism.elastic.executors import EXECUTORS
from moe_prism.elastic.layer import elastic_experts
from moe_prism.evaluation.environment import machine, versions
from moe_prism.evaluation.text import read_text

BATCHES = (4, 8, 16, 32)
Way = dict[str, Any]


class Counter:
    """Counts the different sub-experts of every layer that the cpu executor runs."""

    def __init__(self) -> None:
        self.cls = EXECUTORS.get("cpu")
        self.counts: list[int] = []

    def __enter__(self) -> Counter:
        self.run = run = self.cls.run
        counts = self.counts

        def counting(executor: Any, module: Any, x: Any, selection: Any, *rest: Any) -> torch.Tensor:
            counts.append(len(selection.sub_expert.unique()))
            return run(executor, module, x, selection, *rest)

        self.cls.run = counting  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self.cls.run = self.run  # type: ignore[method-assign]


def ways(full: int, plain: float) -> dict[str, Way]:
    """The ways of selecting at one budget; ``plain``: different sub-experts that plain selection touches."""
    half, quarter = full // 2, full // 4
    return {
        "plain, half": {"k_active": half},
        "plain, floor": {"k_active": quarter},
        "floor, up to half for free": {"k_active": half, "k_min": quarter},
        "floor, up to half, capped": {"k_active": half, "k_min": quarter, "cap": max(1, round(plain / 2))},
        "floor of one, up to half, capped": {"k_active": half, "k_min": 1, "cap": max(1, round(plain / 2))},
    }


def summary(name: str, way: Way, batch: int, times: list[float], counts: list[int]) -> dict[str, Any]:
    """One row of the result."""
    return {"way": name, "batch": batch, **way, "different": round(sum(counts) / len(counts), 1), **quartiles(times)}


@torch.inference_mode()
def on_model(model: PreTrainedModel, ids: torch.Tensor, batch: int, steps: int, context: int) -> list[dict[str, Any]]:
    """All ways on windows of a text."""
    windows = ids[: batch * (context + steps)].view(batch, context + steps)
    cache = DynamicCache(config=model.config)
    model(windows[:, :context], past_key_values=cache)
    with Counter() as counter, budget(model, full_budget(model) // 2):
        model(windows[:, context : context + 1], past_key_values=copy.deepcopy(cache))
    chosen = ways(full_budget(model), sum(counter.counts) / len(counter.counts))
    times: dict[str, list[float]] = {name: [] for name in chosen}
    counts: dict[str, list[int]] = {name: [] for name in chosen}
    kl: dict[str, list[float]] = {name: [] for name in chosen}
    for step in range(steps):
        now = windows[:, context + step : context + step + 1]
        for name, way in chosen.items():
            copied = copy.deepcopy(cache)
            with budget(model, **way):
                begin = time.perf_counter()
                found = model(now, past_key_values=copied).logits
                times[name].append(time.perf_counter() - begin)
                with Counter() as counter:
                    model(now, past_key_values=copy.deepcopy(cache))
            counts[name] += counter.counts
            kl[name].append(found[:, -1])  # type: ignore[arg-type]
        truth = model(now, past_key_values=cache).logits[:, -1].log_softmax(-1)
        for name in chosen:
            other = kl[name][-1].log_softmax(-1)  # type: ignore[attr-defined]
            kl[name][-1] = float((truth.exp() * (truth - other)).sum(-1).mean())
    return [
        {**summary(name, way, batch, times[name], counts[name]), "kl": round(sum(kl[name]) / steps, 4)}
        for name, way in chosen.items()
    ]


@torch.inference_mode()
def on_shape(bench: Bench, batch: int, steps: int) -> list[dict[str, Any]]:
    """All ways on one layer with random weights."""
    state = bench.ours.__dict__["_moe_prism"]
    dial = bench.dial
    chosen: dict[str, Way] = ways(FULL, 0)
    times: dict[str, list[float]] = {name: [] for name in chosen}
    counts: dict[str, list[int]] = {name: [] for name in chosen}
    for step in range(steps + 2):
        x, index, weights = bench.step(batch, torch.bfloat16)
        state.tensors["importance"] = torch.randn(SHAPE["num_experts"], N, generator=bench.rng).exp()
        state._placed.clear()
        for name in chosen:
            way = chosen[name]
            dial.k_active, dial.k_min, dial.cap = way["k_active"], way.get("k_min"), way.get("cap")
            begin = time.perf_counter()
            elastic_experts(bench.ours, x, index, weights)
            took = time.perf_counter() - begin
            with Counter() as counter:
                elastic_experts(bench.ours, x, index, weights)
            if step == 0 and name == "plain, half":
                chosen = ways(FULL, counter.counts[0])
            if step > 1:  # the first two compile and set the cap
                times[name].append(took)
                counts[name] += counter.counts
    return [summary(name, chosen[name], batch, times[name], counts[name]) for name in chosen]


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="elastic checkpoint of the bundled model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("build/bench/batch_selection.json"))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    model = load_elastic(args.checkpoint, dtype=torch.float32, executor="cpu")
    tokenizer = AutoTokenizer.from_pretrained(str(args.checkpoint))
    text = read_text(args.text, 40 * max(BATCHES) * (args.context + args.steps))
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    record: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "machine": {**machine(model), "threads": torch.get_num_threads()},
        "versions": versions(),
        "checkpoint": {"full_budget": dial_of(model).full_budget, "layers": model.config.num_hidden_layers},
        "model": [],
        "olmoe_shape": [],
    }
    for batch in BATCHES:
        record["model"] += on_model(model, ids, batch, args.steps, args.context)
        print(*record["model"][-5:], sep="\n", flush=True)
    bench = Bench(args.seed, baselines=False)
    for batch in BATCHES:
        record["olmoe_shape"] += on_shape(bench, batch, args.steps)
        print(*record["olmoe_shape"][-5:], sep="\n", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(args.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

"""Throughput of the engine against a plain padded batch and against transformers' continuous batching.

All three generate the same number of tokens from the same prompts, greedily, at full budget, in turn; the first round
is a warm-up, the median of the others is kept. Tokens are compared: they must be the same. Knows nothing of policies.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from moe_prism import load_elastic
from moe_prism.checkpoint.atomic import replace_file
from moe_prism.elastic import full_budget
from moe_prism.engine import Engine, Generation, Sampling, TokenEvent
from moe_prism.evaluation.environment import machine, usable_cores, versions
from moe_prism.scheduling import POLICIES, CostModel, Limits, Request
from moe_prism.scheduling.step_load import TERMS

Prompts = list[list[int]]
Tokens = list[list[int]]


def padded(model: PreTrainedModel, prompts: Prompts, tokens: int) -> Tokens:
    """transformers' ``generate`` on one left-padded batch."""
    longest = max(map(len, prompts))
    ids, mask = torch.zeros(2, len(prompts), longest, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    done = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, eos_token_id=-1)
    found: Tokens = done[:, longest:].tolist()
    return found


def continuous_batching(model: PreTrainedModel, prompts: Prompts, tokens: int) -> tuple[Tokens, float]:
    """transformers' own, on a manager that runs already: its start does not count."""
    how = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    memory = ContinuousBatchingConfig(allow_block_sharing=False, max_memory_percent=0.1, page_size=32)
    with model.continuous_batching_context_manager(
        generation_config=how, continuous_batching_config=memory, block=True, timeout=5
    ) as manager:
        began = time.perf_counter()
        ids = manager.add_requests(inputs=prompts, max_new_tokens=tokens)
        done: dict[str, list[int]] = {}
        while len(done) < len(prompts):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                done[result.request_id] = result.generated_tokens
        return [done[id] for id in ids], time.perf_counter() - began


def ours(model: PreTrainedModel, prompts: Prompts, tokens: int) -> Tokens:
    """Our engine with the simplest policy."""
    full = full_budget(model)
    cost = CostModel((1e-3,) * len(TERMS), full, full)
    engine = Engine(
        model, POLICIES.create("fifo", {"cost": cost}), Limits(full, len(prompts), sum(map(len, prompts)) + 2**14)
    )
    for row, prompt in enumerate(prompts):
        request = Request(str(row), engine.clock(), len(prompt), tokens, full, full)
        engine.submit(Generation(request, prompt, Sampling()))
    found: Tokens = [[] for _ in prompts]
    while engine.stats.waiting or engine.stats.running:
        for event in engine.step():
            assert isinstance(event, TokenEvent), event
            found[int(event.id)].append(event.token)
    return found


def timed(call: Callable[[], Tokens]) -> tuple[Tokens, float]:
    """What a call gives, and its seconds."""
    began = time.perf_counter()
    return call(), time.perf_counter() - began


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = load_elastic(args.checkpoint, dtype=torch.float32, verify=False)
    vocabulary = int(model.config.get_text_config().vocab_size)
    rng = np.random.default_rng(args.seed)
    record: dict[str, object] = {
        "command": f"tools/bench_engine.py --requests {args.requests} --tokens {args.tokens} --seed {args.seed}",
        "machine": {**machine(model), "threads": torch.get_num_threads(), "cores": usable_cores()},
        "versions": versions(),
    }
    for count in args.requests:
        prompts = [rng.integers(3, vocabulary, int(rng.integers(32, 257))).tolist() for _ in range(count)]
        seconds: dict[str, list[float]] = {"padded batch": [], "continuous batching": [], "engine": []}
        for turn in range(args.rounds + 1):
            plain, plain_s = timed(lambda prompts=prompts: padded(model, prompts, args.tokens))
            theirs, theirs_s = continuous_batching(model, prompts, args.tokens)
            mine, mine_s = timed(lambda prompts=prompts: ours(model, prompts, args.tokens))
            if not plain == theirs == mine:
                raise SystemExit(f"{count} requests: the three do not give the same tokens")
            if turn:
                for name, value in zip(seconds, (plain_s, theirs_s, mine_s), strict=True):
                    seconds[name].append(value)
        row = {name: count * args.tokens / statistics.median(values) for name, values in seconds.items()}
        record[f"{count} requests, tokens/s"] = row
        print(count, {name: round(value) for name, value in row.items()})
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(args.out, (json.dumps(record, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()

"""Time tokens of an offloaded model in steps of the engine that serves; routing is a recorded one.

    python -m offload_bench.ours JOB RESULT

The cache begins as some hundred tokens of that routing leave it: the rule is run on them, and what it keeps is read.
"""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moe_prism.elastic.budgets import elastic_layers
from moe_prism.elastic.cpu_selection import select
from moe_prism.engine.attention import Span
from moe_prism.engine.runner import PROBE, Runner
from moe_prism.offload import load_offloaded, set_deadline, set_stored
from moe_prism.offload.load import manager_of
from moe_prism.offload.manager import Manager
from moe_prism.offload.parts import blocks_of
from moe_prism.offload.predict import Predictor
from moe_prism.offload.stored import layers_of
from offload_bench.job import Job, disk_bytes, peak_rss, run_worker
from offload_bench.routing import Routing

# Read for the raw bandwidth, before and after the timed tokens.
RAW_BLOCKS = 120


@dataclass
class Position:
    """The token that is running."""

    token: int = 0


@dataclass(frozen=True)
class Replayed(Predictor):
    """Guesses from what the small model's router said."""

    weights: Tensor
    index: Tensor
    position: Position

    def routed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        super().routed(x)  # its time is part of a guess
        now = slice(self.position.token, self.position.token + 1)
        return self.weights[now], self.index[now]


def replay(model: PreTrainedModel, routing: Routing) -> Position:
    """Let every layer route as recorded."""
    position = Position()
    for number, (layer, state) in enumerate(elastic_layers(model)):
        index, weight = torch.from_numpy(routing.index[number]), torch.from_numpy(routing.weight[number])
        own = type(layer.router).forward

        def forward(
            x: Tensor, own: Any = own, router: Any = layer.router, index: Tensor = index, weight: Tensor = weight
        ) -> tuple[Tensor, Tensor, Tensor]:
            logits, _, _ = own(router, x)
            now = slice(position.token, position.token + 1)
            return logits, weight[now].to(x.dtype), index[now]

        layer.router.forward = forward
        blocks = blocks_of(layer.module)
        assert blocks is not None
        if blocks.predictor is not None:
            guess = blocks.predictor
            blocks.predictor = Replayed(
                guess.layer,
                guess.state,
                guess.first,
                torch.from_numpy(routing.guessed_weight[number + 1]),
                torch.from_numpy(routing.guessed_index[number + 1]),
                position,
            )
        # A copy of whole experts has its own scores; quarters have the recorded ones already.
        assert state.num_sub_experts in (1, routing.importance.shape[2])
    return position


def required(
    model: PreTrainedModel, routing: Routing, token: int, job: Job
) -> list[list[tuple[list[int], list[float]]]]:
    """The blocks that every layer runs of a token as stored and from the copy, with their routing weights."""
    found = []
    for number, (layer, state) in enumerate(elastic_layers(model)):
        index = torch.from_numpy(routing.index[number, token : token + 1])
        weight = torch.from_numpy(routing.weight[number, token : token + 1])
        n = state.num_sub_experts
        scores = state.gate.score(layer.module, state.on(index.device), weight, index, n).values
        chosen = {}
        for k in {job.k_active, job.k_stored or job.k_active}:
            picked = select(scores, weight, index, torch.tensor([k]), state.gate.weighted)
            blocks = (picked.sub_expert + number * layer.num_experts * n).tolist()
            chosen[k] = dict(zip(blocks, picked.weight.tolist(), strict=True))
        stored = chosen[job.k_stored or job.k_active]
        low = {block: value for block, value in chosen[job.k_active].items() if block not in stored}
        found.append([(list(some), list(some.values())) for some in (stored, low)])
    return found


def fill(managers: list[Manager], model: PreTrainedModel, routing: Routing, job: Job) -> None:
    """Bring the caches into the state after ``warmup`` tokens."""
    for token in range(job.warmup):
        for number, both in enumerate(required(model, routing, token, job)):
            for manager, (blocks, values) in zip(managers, both, strict=False):
                if blocks:
                    manager.cache.rehearse(blocks, values, token + number / len(manager.layout.layers))
    for manager in managers:
        manager._steps = job.warmup * len(manager.layout.layers)
        with ThreadPoolExecutor(job.readers) as pool:
            list(pool.map(partial(_fill, manager), sorted(manager.cache.place.items())))


def _fill(manager: Manager, place: tuple[int, int]) -> None:
    manager.tier.fill(*place, lambda _: True)


def measure(job: Job) -> dict[str, Any]:
    """Load, fill, time."""
    torch.set_num_threads(job.threads)
    routing = Routing.load(job.routing)
    model = load_offloaded(
        job.model,
        job.memory,
        rule=job.rule,
        readers=job.readers,
        read_ahead=job.read_ahead,
        context=job.tokens + 8,
        shadow=job.shadow,
        verify=False,
    )
    if job.k_stored is not None:
        set_stored(model, job.k_stored)
    manager, position = manager_of(model), replay(model, routing)
    runner = Runner(model, max(job.tokens + 2, PROBE))
    shadow = layers_of(model)[0].shadow
    managers = [manager] if shadow is None else [manager, shadow.manager]
    while any(each.cache.loading(block) for each in managers for block in list(each.cache.place)):
        time.sleep(0.1)  # the runner has tried itself out
    begin = time.perf_counter()
    fill(managers, model, routing, job)
    # With a deadline, the cache begins as the same budget without one leaves it.
    pace = set_deadline(model, **job.options) if job.options else None
    filled = time.perf_counter() - begin
    raw = [manager.tier.bandwidth(job.readers, RAW_BLOCKS, 0)]
    milliseconds, memory = [], []
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, job.tokens + 2)
    for number in itertools.count(-2):  # two tokens are not timed: kernels are loaded in them
        if number == 0:
            before, disk = manager.statistics.since(type(manager.statistics)()), disk_bytes()
        if number == job.tokens:
            break
        position.token = (job.warmup + number + 2) % routing.index.shape[1]
        if number % 100 == 0:
            memory.append(psutil.Process().memory_info().rss / 1e9)
        begin, place = time.perf_counter(), number + 2
        runner.forward(ids[place : place + 1], [Span(0, 1, 0, place)], [job.k_active], [0]).argmax(dim=-1)
        milliseconds.append(1000 * (time.perf_counter() - begin))
    counted, read = manager.statistics.since(before), disk_bytes() - disk
    raw.append(manager.tier.bandwidth(job.readers, RAW_BLOCKS, 1))
    timed = milliseconds[2:]
    return {
        "ms_per_token": mean(timed),
        "ms_median": median(timed),
        "hit_rate": counted.hit_rate,
        "stall_ms": 1000 * counted.stall_seconds / job.tokens,
        "read_gbs": counted.stall_bandwidth / 1e9,
        "raw_read_gbs": mean(raw) / 1e9,
        "raw_read_gbs_before_and_after": [value / 1e9 for value in raw],
        "peak_rss_gb": peak_rss() / 1e9,
        "read_mb_per_token": counted.bytes_read / job.tokens / 1e6,
        "disk_mb_per_token": read / job.tokens / 1e6,
        "prefetch_precision": counted.precision,
        "prefetch_recall": counted.recall,
        "ahead_per_token": counted.ahead / job.tokens,
        "ahead_precision": counted.ahead_precision,
        "cancelled_per_token": counted.cancelled / job.tokens,
        "rss_gb": memory,
        "k_stored": None if pace else job.k_stored,
        "mean_budget": pace.mean_budget if pace else None,
        "mean_low": pace.mean_low if pace else None,
        "places": manager.cache.slots,
        "shadow_places": 0 if shadow is None else shadow.manager.cache.slots,
        "fill_seconds": filled,
        "tokens": job.tokens,
        "ms": timed,
    }


if __name__ == "__main__":
    run_worker(measure)

"""Goodput over HTTP: one server after the other, the same Poisson arrivals with mixed floors, the OpenAI client.

Stock vLLM takes the same requests: it ignores arguments that it does not know.
"""

from __future__ import annotations

import os
import re
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from moe_prism.bench.http_load import HttpLoad
from moe_prism.scheduling.outcomes import Job
from moe_prism.scheduling.workloads import Mix, poisson
from moe_prism.vllm_plugin.config_file import config_text
from moe_prism.vllm_plugin.setup import Options
from vllm_bench.server import serving

NAME = "served"
PROMPT, OUTPUT = 32, 24  # tokens of a request
# Requests that run at once. With hundreds, as is vLLM's default, a CPU takes everybody in and keeps nobody's pace.
RUNNING = 8
FLOORS, WEIGHTS = (0.25, 0.5, 1.0), (0.5, 0.3, 0.2)


@contextmanager
def server(checkpoint: Path, elastic: Options | None, options: dict[str, Any], folder: Path) -> Iterator[str]:
    """``vllm serve`` in processes of its own, with the plugin or with all plugins off; gives its address."""
    settings = {"model": str(checkpoint), "served-model-name": NAME}
    if elastic is not None:
        settings = yaml.safe_load(config_text(checkpoint, elastic, NAME))
    names = {name.replace("_", "-"): value for name, value in options.items()}
    file = folder / f"{'elastic' if elastic else 'stock'}.yaml"
    file.write_text(yaml.safe_dump({**settings, **names, "no-enable-prefix-caching": True}))
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    environment.pop("GOMP_SPINCOUNT", None)  # server, engine and clients share the cores: whoever waits shall sleep
    if elastic is None:
        environment["VLLM_PLUGINS"] = ""
    with serving(file, environment=environment) as address:
        yield address


def _prompts(jobs: Sequence[Job], seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 4000, PROMPT).tolist() for _ in jobs]


def goodput(
    checkpoint: Path,
    cost: Path,
    options: dict[str, Any],
    full: int,
    load: float,
    seconds: float,
    rounds: int = 2,
) -> dict[str, Any]:
    """Both servers under the same arrivals, in turns.

    What stock vLLM sustains is measured first, with as many clients as requests run at once, which wait for their
    replies: it sets the rate, and the objectives are one and a half times the time per token that these clients see,
    and twenty times that to the first.

    Args:
        checkpoint: elastic.
        cost: cost model of the elastic server.
        options: of both.
        full: k * N.
        load: arrivals over what stock vLLM sustains.
        seconds: of arrivals.
        rounds: how often each server has its turn.
    """
    found: dict[str, list[dict[str, Any]]] = {"stock": [], "elastic": []}
    options = {**options, "max_num_seqs": RUNNING}
    with (
        server(checkpoint, None, options, cost.parent) as stock,
        server(checkpoint, Options(cost_model=str(cost.resolve())), options, cost.parent) as elastic,
    ):
        for _ in range(2):  # the first time warms up
            jobs = poisson(30.0, 4.0, [(PROMPT, OUTPUT)], Mix(full, FLOORS, WEIGHTS), seed=0)
            alone = HttpLoad(stock, NAME).saturate(jobs, _prompts(jobs, 0), RUNNING).record()
        rate, tpot_ms = load * alone["throughput_rps"], 1.5 * alone["tpot_ms"]["p50"]
        mix = Mix(full, FLOORS, WEIGHTS, ttft_ms=20 * tpot_ms, tpot_ms=tpot_ms)
        for turn in range(rounds + 1):  # the first one warms up
            for kind, url in (("stock", stock), ("elastic", elastic))[:: 1 if turn % 2 else -1]:
                jobs = poisson(rate, seconds if turn else 3.0, [(PROMPT, OUTPUT)], mix, seed=turn)
                run = HttpLoad(url, NAME).replay(jobs, _prompts(jobs, turn))
                if turn:
                    found[kind].append(run.record())
                    print(
                        f"{kind} {turn}: goodput {found[kind][-1]['goodput_rps']:.2f} of {rate:.2f} requests/s",
                        flush=True,
                    )
        with urllib.request.urlopen(f"{elastic}/metrics") as reply:
            text = reply.read().decode()
    counted = {
        name: sum(float(v) for v in re.findall(rf"^moe_prism:{name}{{.*}} (\S+)$", text, re.MULTILINE))
        for name in ("token_k_active_sum", "token_k_active_count", "degraded_tokens_total", "floor_violations_total")
    }
    means = {kind: median(run["goodput_rps"] for run in runs) for kind, runs in found.items()}
    return {
        "stock_alone": alone,
        "rate_rps": rate,
        "load": load,
        "objectives_ms": {"ttft": mix.ttft_ms, "tpot": mix.tpot_ms},
        "floors": dict(zip(map(str, FLOORS), WEIGHTS, strict=True)),
        "tokens": {"prompt": PROMPT, "output": OUTPUT},
        "running": RUNNING,
        "goodput_rps": means,
        "ratio": means["elastic"] / means["stock"] if means["stock"] else None,
        "elastic_metrics": counted,
        "runs": found,
    }

"""The server over HTTP, with the official OpenAI client: policies under load, overhead, a peer, cold start.

    python tools/bench_serve.py --checkpoint build/bench/reference --out build/bench/serve.json
    make bench-serve

Parts, each in processes of its own, the client in this one: (1) cold start: from the command to the first token;
(2) closed loop, 1 to 64 clients, at full and at half budget; (3) the workloads of ``moe-prism bench schedule``
(Poisson arrivals, multiples of what full budget sustains, here over HTTP), policy by policy, and its targets;
(4) the engine alone, 32 requests at a time, against the same requests over HTTP, streamed and whole, in turns, from the
official client and from a lean one;
(5) ``transformers serve`` on the original model against this server, 8 clients, the same prompts. Prompts are runs of
the text's words of stated lengths; every seed is stated.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from moe_prism.waiting import brief_waiting

os.environ.update(brief_waiting())  # before torch

import httpx2
import numpy as np
from serve_bench.alone import alone
from serve_bench.lean import tokens_per_s

from moe_prism.bench.http_load import HttpLoad
from moe_prism.bench.loads import Plan, saturating
from moe_prism.bench.measured import targets
from moe_prism.bench.results import kl_of, write_results
from moe_prism.bench.scenario import Scenario, plan_of
from moe_prism.checkpoint.read import open_checkpoint
from moe_prism.evaluation.environment import versions
from moe_prism.evaluation.text import read_text
from moe_prism.scheduling.cost_file import read_cost_model
from moe_prism.scheduling.outcomes import Job
from moe_prism.scheduling.workloads import Mix, jobs_of

NAME = "served"
PROMPT, OUTPUT = 48, 32  # tokens of a request
CLIENTS = (1, 8, 32, 64)
POLICIES = ("continuous", "fifo", "fifo-original", "full-batch", "virtual-queues")
SAME = ("--max-running", "32", "--max-prefill", "1000000", "--memory-tokens", "16384")  # as bench schedule
PEER_PORT = 8790


@contextmanager
def server(checkpoint: Path, *options: str, python: Path = Path(sys.executable)) -> Iterator[str]:
    """``moe-prism serve`` in a process; gives its address."""
    code = "from moe_prism.cli import main; main()"
    command = [str(python), "-c", code, "serve", str(checkpoint), "--port", "0", "--name", NAME, "--no-verify"]
    process = subprocess.Popen(
        [*command, "--k-min", "1", "--max-waiting", "100000", *options], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    try:
        found = next((m for line in process.stderr if (m := re.search(r"serving \S+ at (http\S+)", line))), None)
        if found is None:
            raise SystemExit(f"the server ended with code {process.wait()}")
        yield found[1]
        violations = re.search(r"floor_violations_total\{\S* (\S+)", httpx2.get(f"{found[1]}/metrics").text)
        assert violations is not None
        if float(violations[1]):
            raise SystemExit(f"the server counted {violations[1]} floor violations")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@contextmanager
def peer(model: Path, *options: str) -> Iterator[str]:
    """``transformers serve`` on the original model."""
    executable = Path(sys.executable).with_name("transformers")
    command = [str(executable), "serve", str(model), "--port", str(PEER_PORT), "--dtype", "float32", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://localhost:{PEER_PORT}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"transformers serve ended with code {process.returncode}")
            try:
                if httpx2.get(f"{url}/health").status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def jobs(count: int, full: int, k_min: int, k_active: int) -> list[Job]:
    """Requests of one size and one range of budgets, without objectives."""
    made = jobs_of([0.0] * count, [PROMPT] * count, [OUTPUT] * count, Mix(full, (1.0,), (1.0,), None, None), 0)
    return [replace(job, request=replace(job.request, k_min=k_min, k_active=k_active)) for job in made]


class Prompts:
    """Pieces of a text, drawn with a seed."""

    def __init__(self, checkpoint: Path, text: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
        self._ids: list[int] = self.tokenizer(read_text(text)[:400_000], verbose=False).input_ids

    def draw(self, count: int, seed: int) -> list[list[int]]:
        """So many prompts of ``PROMPT`` tokens."""
        return self.of([PROMPT] * count, seed)

    def of(self, lengths: Sequence[int], seed: int) -> list[list[int]]:
        """Prompts of these lengths."""
        starts = np.random.default_rng((seed, 4)).integers(0, len(self._ids) - max(lengths), len(lengths))
        return [self._ids[at : at + length] for at, length in zip(starts.tolist(), lengths, strict=True)]


def cold_start(checkpoint: Path, prompt: Sequence[int], full: int, python: Path, times: int = 3) -> dict[str, Any]:
    """Seconds from the command to the first token, several times; the file cache is warm after the first."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        with server(checkpoint, python=python) as url:
            run = HttpLoad(url, NAME).saturate(jobs(1, full, full, full), [prompt], 1)
            outcome = run.outcomes[0]
            # the run's clock starts with the request
            found.append(time.perf_counter() - began - (outcome.finished - outcome.first_token))
    return {"seconds": found, "median": median(found)}


def closed_loops(url: str, prompts: Prompts, full: int, seconds: float) -> list[dict[str, Any]]:
    """One row per budget and number of clients; the number of requests is set by a short trial."""
    rows = []
    for label, k in (("full", full), ("half", full // 2)):
        for clients in CLIENTS:
            load = HttpLoad(url, NAME)
            trial = load.saturate(jobs(2 * clients, full, k, k), prompts.draw(2 * clients, 1), clients)
            count = max(4 * clients, round(seconds * len(trial.outcomes) / trial.seconds))
            run = load.saturate(jobs(count, full, k, k), prompts.draw(count, 2), clients)
            rows.append({"clients": clients, "policy": "continuous", "budget": label, **run.record()})
            show(rows[-1])
    return rows


def open_loops(checkpoint: Path, prompts: Prompts, plan: Plan, policies: Sequence[str]) -> dict[str, Any]:
    """One row per policy and load; all policies get the same arrivals, floors and prompts."""
    kl = kl_of(open_checkpoint(checkpoint, verify=False).operating_points())

    def texts(work: Sequence[Job]) -> list[list[int]]:
        return prompts.of([job.request.prompt_tokens for job in work], plan.seed)

    with server(checkpoint, "--policy", "system-only", *SAME) as url:
        work = saturating(plan.lengths, plan.mix, plan.seed)
        load = HttpLoad(url, NAME)
        load.saturate(work[:64], texts(work)[:64], 32)
        sustained = load.saturate(work, texts(work), 32).record()["throughput_rps"]
    figures: dict[str, dict[str, Any]] = {}
    rows = []
    for policy in policies:
        with server(checkpoint, "--policy", policy, *SAME) as url:
            for name, share, arriving in plan.build(sustained):
                run = HttpLoad(url, NAME).replay(arriving, texts(arriving))
                figures.setdefault(name, {})[policy] = run.record(kl)
                rows.append({"load": name, "share": share, "policy": policy, **run.record(kl)})
                show(rows[-1])
    return {"full_budget_rps": sustained, "rows": rows, "targets": targets(figures)}


def overhead(checkpoint: Path, prompts: Prompts, full: int, requests: int, rounds: int = 3) -> dict[str, Any]:
    """Tokens a second of the engine alone and over HTTP, 32 requests at a time, in turns.

    Over HTTP once with the official client, and once with one that leaves the processor to the server.
    """
    work, texts = jobs(requests, full, full, full), prompts.draw(requests, 4)
    found: dict[str, list[float]] = {"engine": []}
    for _ in range(rounds):
        found["engine"].append(alone(checkpoint, work, texts, 32))
        with server(checkpoint) as url:
            for name, stream in (("whole", False), ("stream", True)):
                load = HttpLoad(url, NAME, stream=stream)
                load.saturate(work[:32], texts[:32], 32)
                speed = load.saturate(work, texts, 32).record()["tokens_per_s"]
                found.setdefault(f"http {name}", []).append(speed)
                speed = tokens_per_s(url, NAME, work, texts, 32, stream)
                found.setdefault(f"http {name}, lean client", []).append(speed)
    middle = {name: median(values) for name, values in found.items()}
    ratios = {name: speed / middle["engine"] for name, speed in middle.items() if name != "engine"}
    return {"clients": 32, "requests": requests, "tokens_per_s": found, "of_engine": ratios}


def against_peer(checkpoint: Path, original: Path, prompts: Prompts, full: int, requests: int) -> dict[str, Any]:
    """Tokens a second with 8 clients: the peer with its default and with continuous batching, and this server."""
    work = jobs(requests, full, full, full)
    texts = [prompts.tokenizer.decode(ids) for ids in prompts.draw(requests, 5)]
    rows: dict[str, Any] = {}
    for name, options in (("transformers serve", ()), ("transformers serve, continuous", ("--continuous-batching",))):
        with peer(original, *options) as url:
            load = HttpLoad(url, str(original), elastic=False, stream=False)
            load.saturate(work[:8], texts[:8], 8)
            rows[name] = load.saturate(work, texts, 8).record()
    with server(checkpoint) as url:
        load = HttpLoad(url, NAME, stream=False)
        for name, k in (("full budget", full), ("half budget", full // 2)):
            load.saturate(jobs(8, full, k, k), texts[:8], 8)
            rows[name] = load.saturate(jobs(requests, full, k, k), texts, 8).record()
    best = max(rows[name]["tokens_per_s"] for name in rows if name.startswith("transformers"))
    ratios = {name: rows[name]["tokens_per_s"] / best for name in ("full budget", "half budget")}
    return {"clients": 8, "rows": rows, "of_best_peer": ratios}


def show(row: dict[str, Any]) -> None:
    """One line on the screen."""
    what = f"{row.get('clients', row.get('load'))!s:>7} {row['policy']:<15} {row.get('budget', ''):<5}"
    speed = f"{row['throughput_rps']:7.2f} req/s {row['tokens_per_s']:8.1f} tokens/s, goodput {row['goodput_rps']:7.2f}"
    times = f"ttft p99 {row['ttft_ms']['p99']:8.1f} ms, tpot p50 {row['tpot_ms']['p50']:6.1f} ms"
    print(f"{what} {speed}, {times}, mean k {row['mean_k']:.1f}, errors {sum(row['errors'].values())}", flush=True)


def main() -> None:
    """Run the parts and write the file after each."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="elastic, with a cost model")
    parser.add_argument("--original", type=Path, default=Path("models/reference"))
    parser.add_argument(
        "--cold-python", type=Path, default=Path(sys.executable),
        help="of an environment with moe-prism[serve] and nothing else, for cold starts: what is installed beside it, "
        "other libraries may import",
    )  # fmt: skip
    parser.add_argument("--text", type=Path, required=True, help="prompts are taken from it")
    parser.add_argument("--out", type=Path, default=Path("build/bench/serve.json"))
    parser.add_argument("--seconds", type=float, default=12.0, help="of every open load")
    parser.add_argument("--closed-seconds", type=float, default=6.0)
    parser.add_argument("--policies", nargs="+", default=POLICIES, choices=POLICIES)
    parser.add_argument("--ttft-ms", type=float, default=1000.0)
    parser.add_argument("--tpot-ms", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", default=["cold", "closed", "open", "overhead", "peer"])
    options = parser.parse_args()
    opened = open_checkpoint(options.checkpoint)
    full = opened.elastic.full_budget
    prompts = Prompts(options.checkpoint, options.text)
    record: dict[str, Any] = {
        "command": shlex.join(sys.argv), "machine": read_cost_model(options.checkpoint).machine,
        "versions": versions(), "seed": options.seed, "full_budget": full,
        "prompt_tokens": PROMPT, "output_tokens": OUTPUT,
    }  # fmt: skip

    def keep() -> None:
        write_results(options.out, record)

    if "cold" in options.parts:
        record["cold_start"] = cold_start(options.checkpoint, prompts.draw(1, 0)[0], full, options.cold_python)
        print(f"cold start to first token: {record['cold_start']['median']:.2f} s")
        keep()
    if "closed" in options.parts:
        with server(options.checkpoint) as url:
            record["closed"] = closed_loops(url, prompts, full, options.closed_seconds)
        keep()
    if "open" in options.parts:
        scenario = Scenario(
            seconds=options.seconds, seed=options.seed, ttft_ms=options.ttft_ms, tpot_ms=options.tpot_ms
        )
        record["open"] = open_loops(options.checkpoint, prompts, plan_of(scenario, full), options.policies)
        keep()
    if "overhead" in options.parts:
        record["overhead"] = overhead(options.checkpoint, prompts, full, 256)
        print("over HTTP, as a share of the engine alone:", record["overhead"]["of_engine"])
        keep()
    if "peer" in options.parts:
        record["peer"] = against_peer(options.checkpoint, options.original, prompts, full, 96)
        print("times the best of transformers serve:", record["peer"]["of_best_peer"])
        keep()


if __name__ == "__main__":
    main()

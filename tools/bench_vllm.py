"""The plugin in vLLM against stock vLLM: decode steps, and goodput over HTTP; the same sitting, in turns.

    .venv/vllm/bin/python tools/bench_vllm.py CHECKPOINT --out build/bench/vllm.json
    make bench-vllm

Both engines serve one elastic checkpoint, stock vLLM (with plugins off) as the original model that it is. (1) decode
steps of 1 and 8 requests: stock, and with the plugin at full budget, at 9 of 32, and half of the requests at each. The
engines are alive at the same time in processes of their own, with the libraries that vLLM gives its workers, and
take turns case by case. (2) with ``--serve COST``, a cost model of ``moe-prism
vllm-cost``: Poisson arrivals over HTTP at a load that full budget cannot sustain, floors mixed, stock and elastic
servers in turns. Goodput counts requests whose first token and later tokens were all in time. Interrupted between the
two, it goes on with the second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from moe_prism.waiting import brief_waiting

os.environ.update(brief_waiting())  # before torch

from vllm_bench.goodput import goodput
from vllm_bench.libraries import preloaded

from moe_prism.checkpoint.atomic import replace_file
from moe_prism.checkpoint.read import open_checkpoint
from moe_prism.evaluation.environment import cpu_name, usable_cores, versions

TOOLS = Path(__file__).parent
STOCK, ELASTIC = "stock", "elastic"


class Worker:
    """An engine in a process."""

    def __init__(self, checkpoint: Path, kind: str, options: dict[str, Any]) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{TOOLS}:{TOOLS.parent}", "LD_PRELOAD": preloaded()}
        command = [sys.executable, "-m", "vllm_bench.worker", str(checkpoint), kind, json.dumps(options)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.version: str = self._read()["vllm"]

    def steps(self, budgets: list[int | None], prompt: int, steps: int) -> list[float]:
        """Seconds of decode steps of these requests."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"budgets": budgets, "prompt": prompt, "steps": steps}) + "\n")
        self.process.stdin.flush()
        found: list[float] = self._read()["seconds"]
        return found

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"an engine ended with code {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def decode_rows(
    checkpoint: Path, full: int, options: dict[str, Any], rounds: int, prompt: int, steps: int
) -> tuple[list[dict[str, Any]], str]:
    """Tokens per second of every case, and vLLM's version."""
    low = max(1, full * 9 // 32)
    mixes: list[tuple[str, str, list[int | None]]] = [
        (STOCK, "original", [None, None]),
        (ELASTIC, "full", [full, full]),
        (ELASTIC, f"{low} of {full}", [low, low]),
        (ELASTIC, f"half {low}, half {full}", [low, full]),
    ]
    workers = {kind: Worker(checkpoint, kind, options) for kind in (STOCK, ELASTIC)}
    times: dict[tuple[str, int, str], list[float]] = {}
    cases = [(kind, mix, pair, r) for r in (1, 8) for kind, mix, pair in mixes if r > 1 or pair[0] == pair[1]]
    try:
        for kind, _, pair, requests in cases:  # warms up
            workers[kind].steps(list(pair) * (requests // 2) or pair[:1], prompt, 3)
        for turn in range(rounds):
            for kind, mix, pair, requests in cases if turn % 2 else reversed(cases):
                budgets = list(pair) * (requests // 2) or pair[:1]
                found = workers[kind].steps(budgets, prompt, steps)
                times.setdefault((kind, requests, mix), []).append(requests / median(found))
                print(
                    f"{turn + 1}/{rounds} {kind} {requests} {mix}: {requests / median(found):.1f} tokens/s", flush=True
                )
    finally:
        for worker in workers.values():
            worker.close()
    rows = [
        {
            "setup": kind,
            "requests": requests,
            "k_mix": mix,
            "tokens_per_s": median(each),
            "spread": [min(each), max(each)],
        }
        for (kind, requests, mix), each in sorted(times.items(), key=lambda item: (item[0][1], item[0][0] == ELASTIC))
    ]
    return rows, workers[STOCK].version


def ratios(rows: list[dict[str, Any]], full: int) -> dict[str, float]:
    """The figures of the targets."""
    low = max(1, full * 9 // 32)
    speed = {(row["setup"], row["requests"], row["k_mix"]): row["tokens_per_s"] for row in rows}
    at_low, at_full = speed[ELASTIC, 8, f"{low} of {full}"], speed[ELASTIC, 8, "full"]
    mean_time = (1 / at_low + 1 / at_full) / 2
    return {
        "full budget over stock, 1 request": speed[ELASTIC, 1, "full"] / speed[STOCK, 1, "original"],
        "full budget over stock, 8 requests": at_full / speed[STOCK, 8, "original"],
        "9 of 32 over stock, 8 requests": at_low / speed[STOCK, 8, "original"],
        "time of half and half over the mean of both": 1 / speed[ELASTIC, 8, f"half {low}, half {full}"] / mean_time,
    }


def _settings(arguments: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "prompt": arguments.prompt, "steps": arguments.steps, "rounds": arguments.rounds}


def _kept(arguments: argparse.Namespace, options: dict[str, Any]) -> dict[str, Any] | None:
    """What an interrupted run of the same settings has measured."""
    if not arguments.out.is_file():
        return None
    found: dict[str, Any] = json.loads(arguments.out.read_text())
    same = found["settings"] == _settings(arguments, options)
    return found if same and "goodput" not in found and arguments.serve is not None else None


def _write(out: Path, record: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, (json.dumps(record, indent=1) + "\n").encode())


def main() -> None:
    """Parse the arguments, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="elastic, of experts that are most of a step")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=24, help="decode steps of a case in a round")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the model (it runs eagerly)")
    parser.add_argument("--serve", type=Path, metavar="COST", help="also goodput over HTTP, with this cost model")
    parser.add_argument("--serve-seconds", type=float, default=60.0, help="of arrivals, a server and round")
    parser.add_argument("--load", type=float, default=1.15, help="arrivals over what stock vLLM sustains")
    arguments = parser.parse_args()
    full = open_checkpoint(arguments.checkpoint).elastic.full_budget
    options = {
        "dtype": arguments.dtype,
        "enforce_eager": not arguments.compile,
        "max_model_len": 512,
        "max_num_seqs": 32,
        "kv_cache_memory_bytes": 1 << 28,
    }
    record = _kept(arguments, options)
    if record is None:
        rows, version = decode_rows(
            arguments.checkpoint, full, options, arguments.rounds, arguments.prompt, arguments.steps
        )
        record = {
            "machine": {"cpu": cpu_name(), "cores": usable_cores(), "threads": os.environ.get("OMP_NUM_THREADS")},
            "versions": {**versions(), "vllm": version},
            "settings": _settings(arguments, options),
            "rows": rows,
            "ratios": ratios(rows, full),
        }
        _write(arguments.out, record)
    if arguments.serve is not None:
        record["goodput"] = goodput(
            arguments.checkpoint, arguments.serve, options, full, arguments.load, arguments.serve_seconds
        )
        record["ratios"]["goodput over stock"] = record["goodput"]["ratio"]
        _write(arguments.out, record)
    for name, value in record["ratios"].items():
        print(f"{name}: {'nothing to compare' if value is None else format(value, '.3f')}")


if __name__ == "__main__":
    main()

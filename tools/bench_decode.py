"""Time a whole decode step: moe-prism's engine at several budgets, transformers, llama.cpp and vLLM, same weights.

    python tools/bench_decode.py --llama-python LLAMA_ENV/bin/python --vllm-python VLLM_ENV/bin/python

The model has OLMoE's shape, fewer layers and random weights; nothing is downloaded. Every engine runs in a
process of its own, one at a time, and the engines take turns for several rounds. A step is the model, from token
numbers to logits, and the choice of the likeliest token. Threads that wait can spin for long or for a moment
(moe_prism/waiting.py), and which is faster depends on the engine and on what else runs, so every engine runs under both
policies, and the table has its better one. Each engine's logits are compared once with transformers'. Peers live in
other environments, since their requirements exclude each other: one with llama-cpp-python and gguf, one with vLLM. A
peer that is not given is left out. Run it on an idle machine. The model stays in --work for the next run (delete it to
have it written again); the result goes to --out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from decode_bench.job import LONGEST, Job, job_json
from decode_bench.report import LEAST_COSINE, agreement, best, summarise, table

from moe_prism.checkpoint.atomic import replace_file
from moe_prism.errors import PrismError
from moe_prism.waiting import BRIEFLY

TOOLS = Path(__file__).resolve().parent
OURS, STOCK, LLAMA, VLLM = "moe-prism", "transformers", "llama.cpp", "vllm"
FULL = 32
# An engine that failed so often is left out of the other rounds; once may be an accident of a busy machine.
PATIENCE = 2
# (tokens in a step, k_active); 9 of 32 is the smallest floor that the paper's experiments use.
POINTS = {
    OURS: [(1, FULL), (1, 16), (1, 9), (8, FULL), (8, 16)],
    STOCK: [(1, FULL), (8, FULL)],
    LLAMA: [(1, FULL)],
    VLLM: [(1, FULL), (8, FULL)],
}
WORKERS = {
    OURS: "decode_bench.prism_worker",
    STOCK: "decode_bench.torch_worker",
    LLAMA: "decode_bench.llama_worker",
    VLLM: "decode_bench.vllm_worker",
}
# What the user's shell says of threads must not reach the engines: each would take it differently.
WAIT_POLICIES = {"brief": BRIEFLY, "default": {}}
THREAD_SETTINGS = ("OMP_", "GOMP_", "KMP_", "MKL_", "NUMBA_", "OPENBLAS_", "VLLM_", "GGML_", "LD_PRELOAD")


class Model(NamedTuple):
    """The written model, and how many tokens it knows."""

    folder: Path
    gguf: Path
    vocabulary: int


class Engine(NamedTuple):
    """How one engine is run."""

    name: str
    python: Path
    model: Path
    environment: dict[str, str]


class Failed(Exception):
    """A process of an engine ended with an error; the message is the last of what it printed."""


def engines(args: argparse.Namespace, model: Model) -> list[Engine]:
    """Those that can run, in the order of a round."""
    here = Path(sys.executable)
    found = [
        Engine(STOCK, here, model.folder, {}),  # first: the others' logits are compared with its own
        Engine(OURS, here, model.folder, {}),
    ]
    if args.llama_python:
        found.append(Engine(LLAMA, args.llama_python, model.gguf, {}))
    if args.vllm_python:
        settings = {
            # In one process, with all threads: by default it computes on one core less and keeps that for itself.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": str(args.threads),
            "VLLM_CACHE_ROOT": str(args.work / "vllm-cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(args.work / "vllm-cache" / "inductor"),
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_PLUGINS": "",  # without ours, should it be installed there
        }
        found.append(Engine(VLLM, args.vllm_python, model.folder, settings))
    return found


def run(python: Path, arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """Run a module of ours under a Python; raises Failed."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(THREAD_SETTINGS)}
    ours = {"PYTHONPATH": str(TOOLS), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as stream:
        code = subprocess.run(
            [python, "-m", *arguments], env=clean | ours | environment, stdout=stream, stderr=subprocess.STDOUT
        ).returncode
    if code:
        tail = " / ".join([line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:])
        by = f"signal {-code}" if code < 0 else f"exit status {code}"
        raise Failed(f"{by}: {tail or 'it printed nothing'} (all of it: {log})")


def time_engine(engine: Engine, policy: str, number: int, args: argparse.Namespace, vocabulary: int) -> dict[str, Any]:
    """Round ``number`` of one engine under one wait policy; raises Failed."""
    job = Job(
        engine=engine.name,
        model=str(engine.model),
        points=POINTS[engine.name],
        threads=args.threads,
        # The timed steps lie around --context.
        prompt=args.context - args.warmup - args.steps // 2,
        warmup=args.warmup,
        steps=args.steps,
        vocabulary=vocabulary,
        seed=args.seed,
        logits=str(args.work / f"{engine.name}.logits.npy"),
        compiled=args.vllm_compile,
    )
    job_file, result = (args.work / f"{engine.name}.{end}.json" for end in ("job", "result"))
    job_file.write_text(job_json(job))
    environment = engine.environment | WAIT_POLICIES[policy]
    log = _log(args, f"{engine.name}-{number}-{policy}")
    run(engine.python, [WORKERS[engine.name], str(job_file), str(result)], environment, log)
    timed: dict[str, Any] = json.loads(result.read_text())
    return {"engine": engine.name, "wait_policy": policy} | timed


def prepare(args: argparse.Namespace) -> Model:
    """The checkpoint and, where llama.cpp takes part, its GGUF file; written unless they are there."""
    folder = args.work / f"olmoe-{args.layers}-layers-seed-{args.seed}"
    gguf = folder.with_suffix(".gguf")
    if not folder.exists():
        from decode_bench.checkpoint import write_model

        print(f"writing {folder}", file=sys.stderr)
        write_model(folder, args.layers, args.seed)
    if args.llama_python and not gguf.exists():
        print(f"writing {gguf}", file=sys.stderr)
        run(args.llama_python, ["decode_bench.gguf_file", str(folder), str(gguf)], {}, _log(args, "gguf"))
    vocabulary: int = json.loads((folder / "config.json").read_text())["vocab_size"]
    return Model(folder, gguf, vocabulary)


def record(args: argparse.Namespace, command: str, state: dict[str, Any]) -> dict[str, Any]:
    """The content of --out."""
    rounds = state["rounds"]
    last = {result["engine"]: result for result in rounds}
    return {
        "runs": best(summarise(rounds)),
        "runs_by_wait_policy": summarise(rounds),
        "agreement": state["agreement"],
        "machine": last.get(OURS, {}).get("machine", {}),
        "load_average": state["load"],
        "versions": {name: result["versions"] for name, result in last.items()},
        "notes": {name: result["notes"] for name, result in last.items()},
        "left_out": state["left_out"],
        "failed": state["failed"],
        "seed": args.seed,
        "layers": args.layers,
        "settings": {
            "command": command,
            "rounds": args.rounds,
            "steps": args.steps,
            "warmup": args.warmup,
            "context": args.context,
            "threads": args.threads,
            "wait_policies": args.wait_policy,
            "full_budget": FULL,
            "least_cosine": LEAST_COSINE,
        },
    }


def compare(engine: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Agreement of an engine's logits with transformers', whose process ran first; nothing if that failed."""
    if not (args.work / f"{STOCK}.logits.npy").exists():
        return []
    mine, reference = (np.load(args.work / f"{name}.logits.npy") for name in (engine, STOCK))
    found = agreement(mine, reference)
    print(f"  logits against {STOCK}: cosine {found.cosine:.5f}, same argmax: {found.same_argmax}", file=sys.stderr)
    return [{"engine": engine, **found._asdict()}]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", type=Path, help="Python of an environment with llama-cpp-python and gguf")
    parser.add_argument("--vllm-python", type=Path, help="Python of an environment with vLLM for CPUs")
    parser.add_argument("--vllm-compile", action="store_true", help="let vLLM compile the model (it runs eagerly)")
    parser.add_argument("--layers", type=int, default=4, help="0.84 GB each, and 0.41 GB (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="%(default)s")
    parser.add_argument("--steps", type=int, default=32, help="timed steps of a round (%(default)s)")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them (%(default)s)")
    parser.add_argument("--context", type=int, default=64, help="tokens in the cache, in the middle (%(default)s)")
    parser.add_argument("--wait-policy", nargs="+", choices=[*WAIT_POLICIES], default=[*WAIT_POLICIES], help="both")
    parser.add_argument("--threads", type=int, default=2, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("build/bench/decode"), help="%(default)s")
    parser.add_argument("--out", type=Path, default=Path("build/bench/decode.json"), help="%(default)s")
    args = parser.parse_args(argv)
    for name, least, most in (("layers", 1, 64), ("rounds", 1, 99), ("threads", 1, 999), ("steps", 1, 200)):
        if not least <= getattr(args, name) <= most:
            parser.error(f"--{name} must be from {least} to {most}, got {getattr(args, name)}")
    if not 0 <= args.warmup <= 50:
        parser.error(f"--warmup must be from 0 to 50, got {args.warmup}")
    least, most = 2 + args.warmup + args.steps // 2, LONGEST - args.steps - 2
    if not least <= args.context <= most:
        steps = f"{args.warmup} + {args.steps} steps"
        parser.error(f"--context must be from {least} to {most} with {steps}, got {args.context}")
    for name in ("llama_python", "vllm_python"):
        python = getattr(args, name)
        if python and not os.access(python, os.X_OK):
            parser.error(f"--{name.replace('_', '-')} {python} is not an executable; give ENV/bin/python")
    return args


def main(argv: list[str] | None = None) -> int:
    """Prepare, run all rounds, write the result after each; 1 if an engine failed or computes something else."""
    args = parse(argv)
    words = [_without_folders(word) for word in (sys.argv[1:] if argv is None else argv)]
    command = shlex.join(["python", "tools/bench_decode.py", *words])
    args.work = args.work.resolve()
    for folder in (args.work, args.out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for old in args.work.glob("*.logits.npy"):
        old.unlink()
    try:
        model = prepare(args)
    except (PrismError, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    taking_part = engines(args, model)
    left_out = [name for name in (LLAMA, VLLM) if name not in {engine.name for engine in taking_part}]
    for name in left_out:
        print(f"{name} is left out: no --{'llama' if name == LLAMA else name}-python", file=sys.stderr)
    state: dict[str, Any] = {"rounds": [], "agreement": [], "load": [], "left_out": left_out, "failed": {}}
    for number in range(args.rounds):
        state["load"].append(os.getloadavg()[0])
        for engine, policy in itertools.product(taking_part, args.wait_policy):
            failures = state["failed"].get(engine.name, [])
            if len(failures) >= PATIENCE:
                continue
            print(f"round {number + 1}: {engine.name}, {policy}", file=sys.stderr)
            try:
                state["rounds"].append(time_engine(engine, policy, number + 1, args, model.vocabulary))
            except Failed as error:
                state["failed"][engine.name] = [*failures, str(error)]
                print(f"  failed: {error}", file=sys.stderr)
                continue
            if engine.name not in {STOCK, *(entry["engine"] for entry in state["agreement"])}:
                state["agreement"] += compare(engine.name, args)
        replace_file(args.out, (json.dumps(record(args, command, state), indent=1) + "\n").encode())
    print(f"{command}\n\n{table(best(summarise(state['rounds'])), OURS)}\n")
    for name in left_out:
        print(f"{name}: left out, no Python was given")
    for name, reasons in state["failed"].items():
        print(f"{name}: FAILED {len(reasons)} times, at last: {reasons[-1]}")
    wrong = [entry for entry in state["agreement"] if not entry["ok"]]
    for entry in wrong:
        print(f"{entry['engine']}: COMPUTES SOMETHING ELSE, cosine {entry['cosine']:.4f}; its time means nothing")
    print(f"load before each round: {', '.join(f'{load:.1f}' for load in state['load'])} (idle: below 0.5)")
    return 1 if wrong or state["failed"] else 0


def _without_folders(word: str) -> str:
    """An interpreter's path as ENV/bin/python: where its environment lies is the machine's own business."""
    path = Path(word)
    return "/".join(path.parts[-3:]) if path.is_absolute() and path.parent.name == "bin" else word


def _log(args: argparse.Namespace, name: str) -> Path:
    log: Path = args.work / f"{name}.log"
    return log


if __name__ == "__main__":
    raise SystemExit(main())

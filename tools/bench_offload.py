"""Time a model larger than memory: moe-prism's offloading, whole-expert LRU, accelerate's disk offload, llama.cpp.

    python tools/bench_offload.py --checkpoint build/bench/reference --text TEXT

The model has OLMoE-1B-7B's shape and random weights, 14 GB in bf16. Its routing is recorded from the bundled model
(``offload_bench/routing.py`` says how) or drawn uniformly, which is the worst case. Every engine runs in a process of
its own, with a memory budget for all of it, on a cold page cache: blocks are read with O_DIRECT, and the bytes that
the process has had read from the disk are in the result. The cache begins as --warmup tokens of the routing leave it.

The peers: "whole-expert LRU" is the same code with whole experts (N = 1), LRU and no read-ahead, the paper's baseline
without sub-experts; "lru" is sub-experts with LRU and no read-ahead, the paper's manager. "moe-prism, 4 bits" runs the
best quarter of a budget as stored and the rest from the copy at 4 bits; what that costs in quality is measured on the
bundled model (``quality``). "llama.cpp, mmap" maps its file in a group of processes whose memory is limited, page cache
included; it runs all experts of its own routing, which is close to uniform, so it has rows at full budget beside the
uniform ones. It is left out without --llama-python, or where no limit can be set. Files stay in --work for the next run
(58 GB with the peers'; delete them to have them written again); the result goes to --out, after every engine, and a run
that was interrupted goes on with --resume.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from offload_bench.job import Job
from offload_bench.memory_group import memory_group
from offload_bench.report import ACCELERATE, FIELDS, FOREIGN, LLAMA, LOW, LRU, OURS, WHOLE, WITHOUT, table

from moe_prism.checkpoint.atomic import replace_file
from moe_prism.evaluation.environment import versions
from moe_prism.waiting import BRIEFLY

TOOLS = Path(__file__).resolve().parent
WORKERS = {ACCELERATE: "offload_bench.accelerate_peer", LLAMA: "offload_bench.llama_peer"}
# Tokens of llama.cpp, timed and before: one uses 1.6 GB of experts, so that eight turn a cache of 8 GB over.
LLAMA_TOKENS = 8
RULE = "frequent-recent"
FULL = 32
# Budget of the long run, in which memory must not grow, and floor of tokens with a deadline.
SOAK = 8


def jobs(args: argparse.Namespace) -> list[tuple[str, str, Job]]:
    """(engine, routing, job), those to be compared next to each other."""
    found = []
    for routing in args.routing:
        for memory in args.memory:
            for k_active in args.k_active:
                job = job_of(args, routing, memory, k_active)
                whole = str(args.work / f"olmoe-{args.layers}-layers-n1")
                variants = {
                    OURS: job,
                    LOW: replace(job, shadow=args.shadow, k_stored=k_active // 4),
                    WITHOUT: replace(job, read_ahead=False),
                    LRU: replace(job, rule="lru", read_ahead=False),
                    WHOLE: replace(job, model=whole, rule="lru", read_ahead=False, k_active=k_active // 4),
                    ACCELERATE: replace(
                        job,
                        model=str(args.work / f"olmoe-{args.layers}-layers-accelerate"),
                        k_active=k_active // 4,
                        tokens=2,
                        options={"packed": whole},
                    ),
                }
                if (routing, k_active) == ("uniform", FULL):
                    variants[LLAMA] = llama_job(args, job)
                found += [(n, routing, replace(variants[n], engine=n)) for n in args.engines if n in variants]
    for memory in args.memory if OURS in args.engines else ():
        for tpot_ms in args.tpot_ms:
            timed = replace(job_of(args, "local", memory, FULL), options={"tpot_ms": tpot_ms, "k_min": SOAK})
            found.append((f"{OURS}, {tpot_ms:g} ms a token", "local", timed))
            if LOW in args.engines:
                low = replace(timed, shadow=args.shadow, k_stored=SOAK)
                found.append((f"{LOW}, {tpot_ms:g} ms a token", "local", low))
    if args.soak and OURS in args.engines:
        found.append((OURS, "local", replace(job_of(args, "local", args.memory[-1], SOAK), tokens=args.soak)))
    return found


def job_of(args: argparse.Namespace, routing: str, memory: float, k_active: int) -> Job:
    """Ours under some conditions."""
    return Job(
        engine=OURS,
        model=str(args.work / f"olmoe-{args.layers}-layers-n4"),
        memory=int(memory * 1e9),
        routing=str(args.work / f"routing-{routing}.npz"),
        k_active=k_active,
        tokens=args.tokens,
        warmup=args.warmup,
        rule=RULE,
        read_ahead=True,
        readers=args.readers,
        threads=args.threads,
    )


def llama_job(args: argparse.Namespace, job: Job) -> Job:
    """llama.cpp under the same conditions as ours at full budget."""
    return replace(
        job,
        model=str(gguf_of(args)),
        k_active=FULL // 4,
        tokens=min(job.tokens, LLAMA_TOKENS),
        warmup=min(job.warmup, LLAMA_TOKENS),
        options={"python": str(args.llama_python)},
    )


def forms(args: argparse.Namespace) -> dict[Path, float]:
    """The model in the forms that the engines need, and about how many bytes each takes."""
    engines, stem = set(args.engines), args.work / f"olmoe-{args.layers}-layers"
    found = {}
    if engines & {OURS, LOW, WITHOUT, LRU}:
        found[stem.with_name(f"{stem.name}-n4")] = 1.07e9 * args.layers + 0.5e9  # with the copy at 4 bits
    if engines & {WHOLE, *FOREIGN}:
        found[stem.with_name(f"{stem.name}-n1")] = 0.84e9 * args.layers + 0.5e9
    if ACCELERATE in engines:
        found[stem.with_name(f"{stem.name}-accelerate")] = 0.81e9 * args.layers
    if LLAMA in engines:
        found[gguf_of(args)] = 0.84e9 * args.layers + 0.5e9
    return found


def gguf_of(args: argparse.Namespace) -> Path:
    """The model as llama.cpp reads it."""
    path: Path = args.work / f"olmoe-{args.layers}-layers.gguf"
    return path


def prepare(args: argparse.Namespace) -> None:
    """Write routing and models unless they are there."""
    import torch
    from offload_bench.routing import Routing, record, uniform

    torch.set_num_threads(args.threads)
    local = args.work / "routing-local.npz"
    if not local.exists():
        print("recording the routing", file=sys.stderr)
        record(Path("models/reference"), args.checkpoint, args.text, args.layers, 1024, args.seed).save(local)
    routing = Routing.load(local)
    if len(routing.index) != args.layers:
        sys.exit(f"{local} has {len(routing.index)} layers, not {args.layers}; delete it")
    uniform(routing, args.seed + 1).save(args.work / "routing-uniform.npz")
    from offload_bench.packed import write_packed

    importance = torch.from_numpy(routing.importance)
    for parts in (4, 1):
        out = args.work / f"olmoe-{args.layers}-layers-n{parts}"
        if out in forms(args) and not out.exists():
            print(f"writing {out}", file=sys.stderr)

            def tell(done: int, total: int) -> None:
                if done % 256 == 0:
                    print(f"  {done} of {total} blocks", file=sys.stderr)

            write_packed(out, args.layers, parts, importance, args.seed, tell)
    out = args.work / f"olmoe-{args.layers}-layers-accelerate"
    if ACCELERATE in args.engines and not out.exists():
        from offload_bench.accelerate_peer import write_files

        print(f"writing {out}", file=sys.stderr)
        write_files(args.work / f"olmoe-{args.layers}-layers-n1", out)
    if LLAMA in args.engines and not gguf_of(args).exists():
        from offload_bench.llama import write_file

        print(f"writing {gguf_of(args)}", file=sys.stderr)
        write_file(args.llama_python, args.work / f"olmoe-{args.layers}-layers-n1", gguf_of(args), environment(1))


def environment(threads: int) -> dict[str, str]:
    """Of a process that finds the bench's modules."""
    path = os.pathsep.join([str(TOOLS), os.environ.get("PYTHONPATH", "")])
    return os.environ | BRIEFLY | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def run(job: Job, work: Path) -> dict[str, Any]:
    """One process; raises RuntimeError with the end of what it printed."""
    job_file, result, log = (work / f"job.{end}" for end in ("json", "result.json", "log"))
    job_file.write_text(json.dumps(asdict(job)))
    words = [sys.executable, "-m", WORKERS.get(job.engine, "offload_bench.ours"), str(job_file), str(result)]
    limited: dict[str, Any] = {}
    with ExitStack() as stack:
        if job.engine == LLAMA:
            from offload_bench.llama import forget_pages

            forget_pages(Path(job.model))
            group = stack.enter_context(memory_group(job.memory))
            words = group.command([(job.options or {})["python"], *words[1:]])
        with log.open("wb") as stream:
            process = subprocess.run(words, env=environment(job.threads), stdout=stream, stderr=subprocess.STDOUT)
        code = process.returncode
        if job.engine == LLAMA:
            limited = {"peak_group_gb": group.most / 1e9, "limit_reached": group.reached}
    if code:
        tail = " / ".join(log.read_text(errors="replace").splitlines()[-3:])
        raise RuntimeError(f"{job.engine} ended with status {code}: {tail} (all of it: {log})")
    measured: dict[str, Any] = json.loads(result.read_text())
    return measured | limited


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [OURS, LOW, WITHOUT, LRU, WHOLE, *FOREIGN]
    parser.add_argument("--checkpoint", type=Path, required=True, help="the bundled model refactored by reference.yaml")
    parser.add_argument("--text", type=Path, required=True, help="what it reads while its routing is recorded")
    parser.add_argument("--layers", type=int, default=16, help="0.8 GB each, in as many as four forms (%(default)s)")
    parser.add_argument("--memory", type=float, nargs="+", default=[4.0, 8.0], help="GB (4 8)")
    parser.add_argument("--k-active", type=int, nargs="+", default=[FULL // 2, FULL], help="multiples of 4 (16 32)")
    parser.add_argument("--routing", nargs="+", choices=["local", "uniform"], default=["local", "uniform"], help="both")
    parser.add_argument("--engines", nargs="+", choices=everything, default=everything, help="all")
    parser.add_argument("--tokens", type=int, default=24, help="timed tokens (%(default)s)")
    parser.add_argument("--warmup", type=int, default=300, help="tokens before them that fill the cache (%(default)s)")
    parser.add_argument("--tpot-ms", type=float, nargs="*", default=[150.0, 250.0], help="deadlines, floor 8 (150 250)")
    parser.add_argument("--soak", type=int, default=1000, help=f"tokens of a long run at budget {SOAK}; 0: none")
    parser.add_argument("--readers", type=int, default=3, help="threads that read (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="threads that compute (%(default)s)")
    parser.add_argument("--shadow", type=float, default=0.75, help="of the blocks' memory, for 4 bits (%(default)s)")
    parser.add_argument("--llama-python", type=Path, help="of an environment with llama-cpp-python and gguf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="keep the runs that --out has already")
    parser.add_argument("--work", type=Path, default=Path("build/bench/offload"), help="%(default)s")
    parser.add_argument("--out", type=Path, default=Path("build/bench/offload.json"), help="%(default)s")
    args = parser.parse_args(argv)
    bad = [k for k in args.k_active if k % 4 or not 4 <= k <= FULL]
    if bad:
        parser.error(f"--k-active must be multiples of 4 from 4 to {FULL}, got {bad[0]}")
    if not 1 <= args.tokens + args.warmup <= 1000:
        parser.error(f"--tokens and --warmup must add up to 1 .. 1000, got {args.tokens + args.warmup}")
    return args


def main(argv: list[str] | None = None) -> int:
    """Prepare, measure every engine, write the result after each."""
    args = parse(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if LLAMA in args.engines:
        from offload_bench.llama import refusal

        reason = refusal(args.llama_python)
        if reason is not None:
            print(f"{LLAMA} is left out: {reason}", file=sys.stderr)
            args.engines = [name for name in args.engines if name != LLAMA]
    need = 1e9 + sum(size for path, size in forms(args).items() if not path.exists())
    if shutil.disk_usage(args.work).free < need:
        sys.exit(f"{args.work} needs {need / 1e9:.0f} GB of free disk; take fewer --layers and less --memory")
    prepare(args)
    record: dict[str, Any] = {"runs": []}
    names = ("seed", "layers", "threads", "readers", "warmup", "tokens", "shadow")
    settings = {name: getattr(args, name) for name in names}
    if args.resume and args.out.exists():
        record = json.loads(args.out.read_text())
        other = [f"--{name} {record.get(name)}" for name in settings if record.get(name) != settings[name]]
        if other:
            sys.exit(f"{args.out} was measured with {', '.join(other)}; give the same, or another --out")
    keys = ("engine", "routing", "memory_gb", "k_active")
    known = {tuple(run[key] for key in keys) for run in record["runs"]}
    words = shlex.join(sys.argv[1:] if argv is None else argv)
    for engine, routing, job in jobs(args):
        whole = engine in (WHOLE, *FOREIGN)
        about = {
            "engine": engine,
            "memory_gb": job.memory / 1e9,
            "routing": routing,
            "k_active": job.k_active * 4 if whole else job.k_active,
        }
        if tuple(about[key] for key in keys) in known:
            continue
        load = os.getloadavg()[0]
        measured = run(job, args.work)
        row = dict.fromkeys(FIELDS) | about | measured | {"load_average": load}
        record["runs"].append(row)
        record |= {"command": f"python tools/bench_offload.py {words}", "versions": versions(), "cpus": os.cpu_count()}
        record |= settings
        replace_file(args.out, (json.dumps(record, indent=1) + "\n").encode())
        print(table([row]).splitlines()[-1], file=sys.stderr)
    if not record.get("equal_texts"):
        from offload_bench.bundled import equal_texts, quality  # torch takes memory, and the runs want all of it

        packed = args.work / "bundled-packed"
        record["equal_texts"] = equal_texts(args.checkpoint, packed)
        record["quality"] = quality(packed, args.text)
        replace_file(args.out, (json.dumps(record, indent=1) + "\n").encode())
    print(table(record["runs"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

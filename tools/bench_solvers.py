"""Measure every partitioning solver: what it loses and how long it takes, on real and on synthetic experts.

    python tools/bench_solvers.py --model models/reference --text TEXT --experts 32
    python tools/bench_solvers.py --synthetic olmoe-1b-7b --experts 64
    make bench-solvers

Each expert is given to every solver in turn, in an order that rotates from expert to expert, one at a time on
one thread; times are this process's CPU seconds. `balanced (equal time)` spends on each expert at most what the
annealer needs for it, as far as 16 trial experts can tell. The result goes to --out as JSON and, beside it, as a
markdown table; a second problem set with the same --out is added to the first. Knows nothing of how solvers
work, except which options of `balanced` buy quality with time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_prism.errors import PrismError
from moe_prism.refactor.solvers import BEST_SOLVER, SOLVERS, Solver, relative_dropped_mass
from moe_prism.refactor.solvers.balanced import finalists_of

SYNTHETIC = {"olmoe-1b-7b": (2000, 1024)}
"""Tokens and neurons of an expert of that shape."""
REFERENCE = "annealing"
EQUAL_TIME = "balanced (equal time)"
TRIALS = 16
"""Experts, spread over all, whose times decide how many runs equal time means."""


def synthetic_impact(tokens: int, neurons: int, seed: tuple[int, ...]) -> NDArray[np.float32]:
    """|SiLU(g) * u| of a random expert on tokens that mix few topics: [tokens, neurons].

    A hidden state is the sum of four of 96 random topic directions (drawn with popularity rank^-0.7, weight
    gamma(1)) and noise of 0.6 of a direction's length, RMS-normalised. A gate or up column is one topic direction
    and 0.8 of noise, times a log-normal scale (sigma 0.3). This gives the heavy tails of a small trained model
    (there the median is a third of the mean and the 99th percentile 12.8 times the mean; here a quarter and 12.6)
    and a dropped mass in the same range.
    """
    hidden, topics = 192, 96
    rng = np.random.default_rng(seed)
    directions = (rng.standard_normal((topics, hidden)) / hidden**0.5).astype(np.float32)
    popularity = np.arange(1, topics + 1) ** -0.7
    mixture = np.zeros((tokens, topics), np.float32)
    for _ in range(4):
        chosen = rng.choice(topics, size=tokens, p=popularity / popularity.sum())
        mixture[np.arange(tokens), chosen] += rng.gamma(1.0, size=tokens)
    noise = rng.standard_normal((tokens, hidden)) / hidden**0.5
    x = mixture @ directions + 0.6 * noise
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True))

    def projected() -> NDArray[np.float64]:
        own = rng.standard_normal((neurons, hidden)) / hidden**0.5
        scale = rng.lognormal(0.0, 0.3, size=(neurons, 1))
        product: NDArray[np.float64] = x @ ((directions[rng.integers(topics, size=neurons)] + 0.8 * own) * scale).T
        return product

    gate, up = projected(), projected()
    impact: NDArray[np.float32] = np.abs(gate / (1 + np.exp(-gate)) * up).astype(np.float32)
    return impact


def model_impacts(args: argparse.Namespace) -> Iterator[NDArray[np.float32]]:
    """|activation| [B, C] of experts spread evenly over the layers of a model (--experts of them, or all)."""
    from moe_prism.experts import find_expert_layers
    from moe_prism.refactor.calibration import load_calibration
    from moe_prism.refactor.capture import capture, read_layer
    from moe_prism.refactor.pipeline import load_stock
    from moe_prism.refactor.profile import profile_expert

    model, tokenizer = load_stock(str(args.model), dtype="float32")
    layers = find_expert_layers(model)
    every = [(number, expert) for number, layer in enumerate(layers) for expert in range(layer.num_experts)]
    count = min(args.experts or len(every), len(every))
    chosen = [every[i * len(every) // count] for i in range(count)]
    text = load_calibration(str(args.text), tokenizer, model, args.tokens, args.context, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        capture(model, layers, text.windows, Path(folder))
        for number, layer in enumerate(layers):
            received = read_layer(Path(folder), layer)
            for expert in (e for n, e in chosen if n == number):
                seed = (args.seed, number, expert)
                profile = profile_expert(layer, received, expert, args.max_tokens, 64, seed)
                yield np.ascontiguousarray(profile.activations.abs().numpy())


def timed(solver: Solver, impact: NDArray[np.float32], args: argparse.Namespace) -> tuple[float, float]:
    """Relative dropped mass and CPU seconds of one solution."""
    start = time.process_time()
    labels = solver.solve(impact, args.num_sub_experts, args.switched_off, args.seed)
    seconds = time.process_time() - start
    return relative_dropped_mass(impact, labels, args.num_sub_experts, args.switched_off), seconds


def contestants(trial: list[NDArray[np.float32]], args: argparse.Namespace) -> dict[str, Solver]:
    """Every registered solver with its defaults, and balanced with as many runs as the annealer's time allows."""
    solvers = {name: SOLVERS.create(name) for name in SOLVERS}
    for solver in solvers.values():
        timed(solver, trial[0][:64], args)  # compiles
    plain, few, many = (
        SOLVERS.create("balanced", {"runs": r, "polish_rounds": p}) for r, p in ((1, 0), (1, 10), (5, 10))
    )
    timed(few, trial[0][:64], args)

    def seconds(solver: Solver) -> float:
        return float(np.mean([np.median([timed(solver, i, args)[1] for _ in range(3)]) for i in trial]))

    one = seconds(few)
    per_run, per_polish = (seconds(many) - one) / 4, one - seconds(plain)
    allowed = 0.97 * seconds(solvers[REFERENCE])
    runs = 1
    while runs < 100 and one + runs * per_run + (finalists_of(runs + 1) - 1) * per_polish <= allowed:
        runs += 1
    solvers[EQUAL_TIME] = SOLVERS.create("balanced", {"runs": runs, "polish_rounds": 10})
    return solvers


def measure(impacts: Iterator[NDArray[np.float32]], args: argparse.Namespace) -> dict[str, Any]:
    """Every solver on every expert: {"shape", "solvers": {name: {"options", "dropped": [...], "seconds": [...]}}}."""
    every = list(impacts)
    first = every[0]
    solvers = contestants(every[:: max(1, len(every) // TRIALS)], args)
    names = list(solvers)
    dropped: dict[str, list[float]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    tokens: list[int] = []

    def run(impact: NDArray[np.float32]) -> None:
        shift = len(tokens) % len(names)
        for name in names[shift:] + names[:shift]:
            loss, spent = timed(solvers[name], impact, args)
            dropped[name].append(loss)
            seconds[name].append(spent)
        tokens.append(len(impact))
        best = min(names, key=lambda name: dropped[name][-1])
        print(f"expert {len(tokens)}: {impact.shape} best {dropped[best][-1]:.4f} ({best})", file=sys.stderr)

    for impact in every:
        run(impact)
    return {
        "experts": len(tokens),
        "neurons": first.shape[1],
        "tokens": {"median": float(np.median(tokens)), "min": min(tokens), "max": max(tokens)},
        "solvers": {
            name: {"options": vars(solvers[name]), "dropped": dropped[name], "seconds": seconds[name]} for name in names
        },
    }


def summary(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per solver, best first; quartiles over experts, and its standing against the annealer."""
    reference = result["solvers"][REFERENCE]
    base_loss, base_time = np.array(reference["dropped"]), np.array(reference["seconds"])
    rows = []
    for name, measured in result["solvers"].items():
        loss, spent = np.array(measured["dropped"]), np.array(measured["seconds"])
        rows.append(
            {
                "solver": name,
                "dropped_mean": float(loss.mean()),
                "dropped_quartiles": np.quantile(loss, [0.25, 0.5, 0.75]).tolist(),
                "seconds_quartiles": np.quantile(spent, [0.25, 0.5, 0.75]).tolist(),
                "time_ratio_mean": float((spent / base_time).mean()),
                "dropped_ratio_mean": float((loss / base_loss).mean()),
                "share_better": float((loss < base_loss).mean()),
                "share_better_or_equal": float((loss <= base_loss * (1 + 1e-9)).mean()),
                # Two cores, one expert each; the mean, because it is the sum that takes the time.
                "minutes_per_1024_experts_2_cores": float(spent.mean() * 1024 / 2 / 60),
            }
        )
    return sorted(rows, key=lambda row: row["dropped_mean"])


def markdown(results: dict[str, Any]) -> str:
    """The tables of all problem sets in the file."""
    lines = ["# Partitioning solvers", ""]
    for title, result in results.items():
        setup, machine = result["setup"], result["machine"]
        lines += [
            f"## {title}",
            "",
            f"{result['experts']} experts of {result['neurons']} neurons, {result['tokens']['median']:g} tokens each "
            f"(median), N = {setup['num_sub_experts']}, switched off: {setup['switched_off'] or 'mean over all K'}, "
            f"seed {setup['seed']}. {machine['cpu']}, {machine['cores']} cores, "
            + ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
            + f". Ours is `{BEST_SOLVER}`; equal time means {result['solvers'][EQUAL_TIME]['options']}.",
            "",
            f"Made by `{setup['command']}`",
            "",
            "| solver | dropped mass, mean (quartiles) | CPU ms, median (quartiles) | time / annealer "
            "| dropped / annealer | better than annealer | min for 1,024 experts on 2 cores |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in result["summary"]:
            loss, spent = row["dropped_quartiles"], [1000 * s for s in row["seconds_quartiles"]]
            lines.append(
                f"| {row['solver']} | {row['dropped_mean']:.4f} ({loss[0]:.4f} to {loss[2]:.4f}) "
                f"| {spent[1]:.1f} ({spent[0]:.1f} to {spent[2]:.1f}) | {row['time_ratio_mean']:.3f} "
                f"| {row['dropped_ratio_mean']:.4f} | {row['share_better']:.1%} "
                f"| {row['minutes_per_1024_experts_2_cores']:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Processor, cores and the versions that matter for speed."""
    import numba
    import scipy

    info = Path("/proc/cpuinfo")
    models = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return {
        "cpu": models[0].split(":", 1)[1].strip() if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "numba": numba.__version__,
            "scipy": scipy.__version__,
        },
    }


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; --switched-off mean becomes None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="profile the experts of this model directory; needs --text")
    source.add_argument("--synthetic", choices=sorted(SYNTHETIC), help="random experts of this model's shape")
    parser.add_argument("--text", type=Path, help="calibration text, plain or xz")
    parser.add_argument("--experts", type=int, help="how many (all of a model, 64 synthetic)")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens (%(default)s)")
    parser.add_argument("--context", type=int, default=512, help="tokens of a calibration window (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=2000, help="tokens kept of an expert (%(default)s)")
    parser.add_argument("--num-sub-experts", type=int, default=4, help="N (%(default)s)")
    parser.add_argument("--switched-off", default="2", help="K, or mean for the mean over all K (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and solvers (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("docs/results/solvers.json"), help="%(default)s")
    args = parser.parse_args(argv)
    if args.model and not args.text:
        parser.error("--model needs --text FILE, the text to profile on")
    if args.experts is not None and args.experts < 1:
        parser.error(f"--experts must be 1 or more, got {args.experts}")
    if args.switched_off != "mean" and not args.switched_off.isdecimal():
        parser.error(f"--switched-off must be a number or mean, got {args.switched_off}")
    args.switched_off = None if args.switched_off == "mean" else int(args.switched_off)
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure one problem set and put it into the result files."""
    args = parse(argv)
    if args.synthetic:
        tokens, neurons = SYNTHETIC[args.synthetic]
        impacts: Iterator[NDArray[np.float32]] = (
            synthetic_impact(tokens, neurons, (args.seed, e)) for e in range(args.experts or 64)
        )
        title = f"Synthetic experts of the {args.synthetic} shape"
    else:
        impacts, title = model_impacts(args), f"Experts of {args.model.name}"
    title += f", K = {args.switched_off or 'mean'} of N = {args.num_sub_experts}"
    try:
        result = measure(impacts, args)
    except PrismError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = shlex.join(["python", "tools/bench_solvers.py", *(sys.argv[1:] if argv is None else argv)])
    setup = {name: getattr(args, name) for name in ("num_sub_experts", "switched_off", "seed")} | {"command": command}
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results[title] = {"setup": setup, "machine": machine(), "summary": summary(result), **result}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(markdown(results))
    print(markdown({title: results[title]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

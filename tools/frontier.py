"""The frontier, method by method at equal total routed cost: excess loss, KL and top-1 agreement over the full model.

    python tools/frontier.py --calibration CALIBRATION.txt --text HELD-OUT.txt [--mcq QUESTIONS.jsonl --questions 50]
    make frontier, make frontier-second, make frontier-dense

Every row is the public way: a recipe refactors the model, and the largest budget whose cost, scoring included, is
within the share is measured. Rows are kept one by one, so a run that was stopped goes on where it was. The baseline
is the original model with fewer whole experts; beside it stands the original with its experts rounded to 8 and 4 bits
(groups of 32, to nearest), which saves bytes and no FLOPs: what users will ask about. FLOPs and bytes of a token that
is alone in its step are two axes: the ladder, which reads few bits, is measured at the largest budget of each; for the
other methods they are the same share, since every weight that is used is read once. A model with
one expert (a dense model, tools/dense_bed.py) has no experts to drop: "static" is then what others are compared with.
Accuracy on multiple-choice questions does not depend on the text and stands in the rows of every text; they are asked
of the first seed and calibration text only, as they take longer than all the rest. Knows nothing of time.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from moe_prism.waiting import brief_waiting

os.environ.update(brief_waiting())  # before torch

import matplotlib as mpl
import torch

from moe_prism import Recipe, make_elastic
from moe_prism.checkpoint.atomic import replace_file
from moe_prism.elastic import budget, budget_within, cost_shares, load_elastic, routed_experts
from moe_prism.errors import PrismError
from moe_prism.evaluation.choices import Question, answer, load_questions
from moe_prism.evaluation.environment import machine, versions
from moe_prism.evaluation.measure import Run, measure
from moe_prism.evaluation.points import RunResult, paired_difference
from moe_prism.evaluation.text import read_text, text_name, tokenize, windows
from moe_prism.experts import find_expert_layers
from moe_prism.refactor import load_stock

SHARES = (0.75, 0.5, 0.25)
_PAPER = {"solver": "annealing", "impact": "activation", "neurons": "all"}
_STATIC = {"solver": "importance", "gate": "static", "neurons": "all"}
_PROBE = {"solver": "importance", "gate": "probe", "neurons": "all"}
_NEURONS = {"neurons": "gate-first"}
_BEST = _STATIC | _NEURONS | {"compensation_budgets": 8}
_FINETUNE = {"objective": "distillation", "steps": 150, "batch": 4, "learning_rate": 0.05}
METHODS: dict[str, dict[str, Any]] = {
    "paper: proxy": _PAPER | {"gate": "proxy", "gate_options": {"weighted": False}},
    "paper: linear": _PAPER | {"gate": "linear"},
    "balanced, weighted proxy": {"solver": "balanced", "gate": "proxy", "neurons": "all"},
    "static": _STATIC,
    "static, compensated": _STATIC | {"compensation_budgets": 8},
    "gate-first": _STATIC | _NEURONS,
    "gate-first, compensated": _BEST,
    "gate-first, compensated, shared by tokens": _BEST | {"token_budgets": "shared"},
    "gate-first, compensated, spread over layers": _BEST | {"layer_budgets": "measured"},
    "gate-first, compensated, shared and spread": _BEST | {"token_budgets": "shared", "layer_budgets": "measured"},
    "ladder": _STATIC | _NEURONS | {"shadow_bits": 4},
    "paper: linear, finetuned": _PAPER | {
        "gate": "linear", "gate_options": {"weighted": False, "reweights": True},
        "finetune": _FINETUNE | {
            "objective": "cross-entropy", "curriculum": "rising", "shares": [0.1, 0.7], "learning_rate": 0.005,
        },
    },
    "gate-first, compensated, finetuned": _BEST | {"finetune": _FINETUNE},
}  # fmt: skip
# What varies one thing of the above; `make ablation` measures them.
ABLATIONS: dict[str, dict[str, Any]] = {
    "static, scaled": _STATIC | {"compensation_budgets": 8, "recalibration": "scale"},
    "static, renormalised": _STATIC | {"recalibration": "renormalise"},
    "static, folded": _STATIC | {"fold": True},
    "static, folded, compensated": _STATIC | {"fold": True, "compensation_budgets": 8},
    "probe": _PROBE,
    "probe, compensated": _PROBE | {"compensation_budgets": 8},
    "gate-first, scaled": _STATIC | _NEURONS | {"compensation_budgets": 8, "recalibration": "scale"},
    "gate-first, renormalised": _STATIC | _NEURONS | {"recalibration": "renormalise"},
    "ladder, compensated": _STATIC | _NEURONS | {"shadow_bits": 4, "compensation_budgets": 8},
    "gate-first, blocks of 8": _STATIC | _NEURONS | {"neuron_block": 8},
    "gate-first, blocks of 24": _STATIC | _NEURONS | {"neuron_block": 24},
    "gate-first, blocks of 64": _STATIC | _NEURONS | {"neuron_block": 64},
}
ALL = METHODS | ABLATIONS
ORIGINAL = "original"
BASELINE = "fewer experts"
ROUNDED = {8: "original, experts at 8 bits", 4: "original, experts at 4 bits"}
GROUP = 32
DROPPED_FIRST = (BASELINE, "static")  # the first of them that was measured is the baseline of the ratios


AXES = ("bytes", "flops")
BOTH = "both"


class Questions(NamedTuple):
    """Multiple-choice questions by the name of their set, and the tokenizer to ask them with."""

    sets: dict[str, list[Question]]
    tokenizer: Any

    def accuracies(self, model: Any, runs: list[Run]) -> dict[str, dict[str, float]]:
        """Accuracy per set and their mean (``mcq``) of every run, ready for its rows; nothing without questions."""
        found: dict[str, dict[str, float]] = {run.name: {} for run in runs}
        for name, asked in self.sets.items():
            for run, right in answer(model, self.tokenizer, asked, runs).items():
                found[run][name] = round(float(right.mean()), 4)
        return {
            run: {"mcq": round(sum(sets.values()) / len(sets), 4), "mcq_sets": sets} if sets else {"mcq": None}
            for run, sets in found.items()
        }


class Held(NamedTuple):
    """What every run is measured on: windows of every text by its name, and questions."""

    texts: dict[str, torch.Tensor]
    questions: Questions


def rows_of(model: Any, runs: dict[tuple[float, str], Run], held: Held, known: dict[str, Any]) -> list[Any]:
    """Every run, by its share and the axis that the share is of, on every text, as lines of the result."""
    if not runs:
        return []
    rows = []
    different = list({run.name: run for run in runs.values()}.values())  # two shares may allow the same budget
    accuracies = held.questions.accuracies(model, different)
    for text, ids in held.texts.items():
        results = measure(model, ids, [Run("full", None), *different])
        for (share, axis), run in runs.items():
            result: RunResult = results[run.name]
            excess, error = paired_difference(result.nll, results["full"].nll)
            figures = {"excess_nats": excess, "stderr": error, "kl": result.kl, "top1_agreement": result.top1_agreement}
            rounded = {name: round(value, 6) for name, value in figures.items()}
            rows.append(
                known
                | {"text": text, "share": share, "axis": axis, "setting": run.name}
                | rounded
                | accuracies[run.name]
            )
    return rows


def original_rows(source: str, held: Held) -> list[Any]:
    """The original as it is, and with whole experts dropped."""
    model, _ = load_stock(source, "float32")
    known: dict[str, Any] = {"seed": None, "calibration": None}
    rows = rows_of(model, {(1.0, BOTH): Run("as it is", None)}, held, {"method": ORIGINAL} | known)
    top_k = find_expert_layers(model)[0].top_k
    runs: dict[tuple[float, str], Run] = {}
    for share in SHARES:
        k = int(share * top_k + 1e-9)
        if k:
            runs[share, BOTH] = Run(f"{k} of {top_k} experts", partial(routed_experts, model, k))
    return rows + rows_of(model, runs, held, {"method": BASELINE} | known)


@torch.no_grad()
def round_weights(weight: torch.Tensor, bits: int) -> None:
    """Round to nearest in place, along the last dimension in groups of 32 with one scale each."""
    groups = weight.unflatten(-1, (-1, min(GROUP, weight.shape[-1])))
    most = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / most
    weight.copy_(((groups / scale).round().clamp(-most - 1, most) * scale).flatten(-2))


def quantised_rows(source: str, held: Held, bits: int) -> list[Any]:
    """The original with all experts at a few bits; the share is of bytes, a 16-bit scale for every group included."""
    model, _ = load_stock(source, "float32")
    rounded, _ = load_stock(source, "float32")
    for layer in find_expert_layers(rounded):
        for parameter in (layer.module.gate_up_proj, layer.module.down_proj):
            round_weights(parameter.data, bits)  # type: ignore[arg-type]
    share = (bits + 16 / GROUP) / 16
    run = Run("every expert", nullcontext, rounded)
    return rows_of(model, {(share, "bytes"): run}, held, {"method": ROUNDED[bits], "seed": None, "calibration": None})


def method_rows(args: argparse.Namespace, method: str, seed: int, calibration: Path, held: Held) -> list[Any]:
    """Refactor by one method, then measure."""
    recipe = Recipe.of(ALL[method] | {
        "num_sub_experts": args.num_sub_experts, "calibration_tokens": args.calibration_tokens, "seed": seed,
    })  # fmt: skip
    folder = args.out.parent / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    # Another seed reads other calibration text: a static order has no other randomness.
    text = args.out.parent / "calibration.txt"
    characters = args.calibration_tokens * 16
    start, more = characters * seed, 0
    if recipe.finetune is not None:  # after the same calibration text, text that no seed calibrates on
        more = recipe.finetune.steps * recipe.finetune.batch * recipe.context * 8
    first = 8 * characters + seed * more
    whole = read_text(calibration, first + more)
    text.write_text(whole[start:][:characters] + whole[first:][:more], encoding="utf-8")
    make_elastic(args.model, folder, recipe, text=str(text), compute_dtype="float32")
    model = load_elastic(folder, dtype="float32")
    runs: dict[tuple[float, str], Run] = {}
    for share in SHARES:
        fits = {axis: budget_within(model, share, (axis,)) for axis in AXES}
        if len(set(fits.values())) == 1:
            fits = {BOTH: fits[AXES[0]]}
        for axis, k in fits.items():
            if k is not None:
                cost = cost_shares(model, k)
                name = f"budget {k} at {cost.bytes:.3f} of the bytes, {cost.flops:.3f} of the FLOPs"
                runs[share, axis] = Run(name, partial(budget, model, k))
    return rows_of(model, runs, held, {"method": method, "seed": seed, "calibration": text_name(calibration)})


def table(rows: list[Any]) -> str:
    """Mean excess over seeds, and its ratio to the baseline's, per calibration text, text and share."""
    baseline = next((name for name in DROPPED_FIRST if any(row["method"] == name for row in rows)), BASELINE)
    lines = ["| calibration | text | method | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |"]
    lines.append("|" + "---|" * (3 + len(SHARES)))
    for calibration in sorted({row["calibration"] for row in rows if row["calibration"]}):
        for text in dict.fromkeys(row["text"] for row in rows):
            for method, axis in _lines(rows):
                cells = []
                for share in SHARES:
                    mine = _mean(rows, method, calibration, text, share, axis)
                    base = _mean(rows, baseline, calibration, text, share, axis)
                    ratio = "" if mine is None or not base or method == baseline else f" ({mine / base:.2f})"
                    cells.append("" if mine is None else f"{mine:+.4f}{ratio}")
                if any(cells):
                    lines.append(f"| {calibration} | {text} | {_label(method, axis)} | {' | '.join(cells)} |")
    lines += ["", "| text | method | bytes | FLOPs | excess |", "|---|---|---|---|---|"]
    for row in rows:
        if row["method"] in ROUNDED.values():
            cells = (row["text"], row["method"], f"{row['share']:.3f}", "1", f"{row['excess_nats']:+.4f}")
            lines.append(f"| {' | '.join(cells)} |")
    if any(row["mcq"] is not None for row in rows):
        lines += ["", "| method | share | multiple choice | sets |", "|---|---|---|---|"]
        for row in rows:
            if row["text"] == rows[0]["text"] and row["mcq"] is not None:
                sets = ", ".join(f"{name} {value:.1%}" for name, value in row["mcq_sets"].items())
                lines.append(
                    f"| {_label(row['method'], row['axis'])} | {row['share']:.0%} | {row['mcq']:.1%} | {sets} |"
                )
    return "\n".join(lines)


def _lines(rows: list[Any]) -> list[tuple[str, str]]:
    """Methods with the axes that they were measured on; one that differs nowhere stands for both."""
    measured = {(row["method"], row["axis"]) for row in rows}
    found: list[tuple[str, str]] = []
    for method in (BASELINE, *ALL):
        apart = [axis for axis in AXES if (method, axis) in measured]
        found += [(method, axis) for axis in apart or [BOTH]]
    return found


def _label(method: str, axis: str) -> str:
    return method if axis == BOTH else f"{method} ({'FLOPs' if axis == 'flops' else axis})"


def _mean(rows: list[Any], method: str, calibration: str, text: str, share: float, axis: str) -> float | None:
    found = [
        row["excess_nats"]
        for row in rows
        if (row["method"], row["text"], row["share"]) == (method, text, share)
        and (row["axis"] == axis or BOTH in (row["axis"], axis))
        and row["calibration"] in (None, calibration)
    ]
    return sum(found) / len(found) if found else None


def plot(rows: list[Any], path: Path) -> None:
    """Excess loss against cost, one panel a text, calibrated on the first calibration text."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    calibration = next(row["calibration"] for row in rows if row["calibration"])
    texts = list(dict.fromkeys(row["text"] for row in rows))
    figure, panels = plt.subplots(1, len(texts), figsize=(6 * len(texts), 4.5), squeeze=False)
    for panel, text in zip(panels[0], texts, strict=True):
        for (method, axis), colour in zip(_lines(rows), mpl.colormaps["tab20"].colors, strict=False):
            points = [(s, _mean(rows, method, calibration, text, s, axis)) for s in SHARES]
            known = [(share, max(value, 1e-4)) for share, value in points if value is not None]
            if known:
                panel.plot(*zip(*known, strict=True), "o-", color=colour, label=_label(method, axis))
        panel.set(
            yscale="log",
            title=text,
            xlabel="total routed cost",
            ylabel="excess loss, nats per token\n(drawn at 0.0001 where lower)",
        )
        panel.grid(alpha=0.3)
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=8, ncols=4, loc="lower center")
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure what is missing, then write table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/reference")
    parser.add_argument("--calibration", type=Path, nargs="+", required=True, help="the first with all seeds")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="held-out texts")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16_384, help="of every held-out text")
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--num-sub-experts", type=int, default=8)
    parser.add_argument("--mcq", type=Path, nargs="*", default=[], help="multiple-choice sets (.jsonl)")
    parser.add_argument("--questions", type=int, default=100, help="of every set")
    parser.add_argument("--methods", nargs="+", choices=[*ALL], default=[*METHODS])
    parser.add_argument("--out", type=Path, default=Path("build/frontier/frontier.json"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        "command": shlex.join(["python", *sys.argv]), "model": text_name(args.model), "tokens": args.tokens,
        "calibration_tokens": args.calibration_tokens, "num_sub_experts": args.num_sub_experts,
        "texts": [text_name(path) for path in args.text], "questions": {path.stem: args.questions for path in args.mcq},
    }  # fmt: skip
    try:
        rows = measure_missing(args, settings)
    except PrismError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    plot(rows, args.out.with_suffix(".png"))
    return 0


def measure_missing(args: argparse.Namespace, settings: dict[str, Any]) -> list[Any]:
    """All rows asked for; those that an earlier run with these settings left are kept."""
    rows: list[Any] = []
    if args.out.exists():
        before = json.loads(args.out.read_text())
        if before["settings"] | {"command": ""} == settings | {"command": ""}:
            rows = before["rows"]
    sets = {path.stem: load_questions(path, args.questions) for path in args.mcq}
    model, tokenizer = load_stock(args.model, "float32")
    where = machine(model)
    texts = {
        text_name(path): windows(tokenize(tokenizer, read_text(path, args.tokens * 16), args.tokens + 1), 256)
        for path in args.text
    }
    held = Held(texts, Questions(sets, tokenizer))

    def keep(new: list[Any]) -> None:
        rows.extend(new)
        record = {"settings": settings, "machine": where, "versions": versions(), "rows": rows}
        replace_file(args.out, (json.dumps(record, indent=1) + "\n").encode())

    def missing(method: str, seed: int | None, calibration: str | None) -> bool:
        key = (method, seed, calibration)
        return not any((row["method"], row["seed"], row["calibration"]) == key for row in rows)

    if missing(ORIGINAL, None, None):
        keep(original_rows(args.model, held))
    for bits, name in ROUNDED.items():
        if missing(name, None, None):
            keep(quantised_rows(args.model, held, bits))
    for number, calibration in enumerate(args.calibration):
        for seed in range(args.seeds if number == 0 else 1):
            for method in args.methods:
                if missing(method, seed, text_name(calibration)):
                    print(f"{calibration.name}, seed {seed}: {method}", file=sys.stderr, flush=True)
                    ask = held if number == seed == 0 else held._replace(questions=held.questions._replace(sets={}))
                    keep(method_rows(args, method, seed, calibration, ask))
    return rows


if __name__ == "__main__":
    raise SystemExit(main())

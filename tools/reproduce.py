"""The paper's main table (arXiv 2510.19366) run again: perplexity at equal activated parameters.

    python tools/reproduce.py allenai/OLMoE-1B-7B-0924 --text wikitext-test.txt --calibration wikitext-train.txt
    make reproduce MODEL=allenai/OLMoE-1B-7B-0924

At N = 4, for every K: the original with K / 4 experts; the paper's training-free gate (CG); its linear gate without
finetuning (LG); and ours, by a recipe, at the largest budget that costs no more than K sub-experts, scoring included.
The paper's gates are given their scoring for free, as in the paper. Perplexity depends on how text is cut into windows,
which the paper does not say: compare columns, and ratios with the published ones. One model is in memory at a time,
and what was measured is kept, so a run that was stopped goes on. Writes JSON and Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

from moe_prism.waiting import brief_waiting

os.environ.update(brief_waiting())  # before torch

from moe_prism import Recipe
from moe_prism.checkpoint.atomic import replace_file
from moe_prism.cli.console import compute_dtype
from moe_prism.elastic import attach, budget, budget_within, cost_shares, full_budget, routed_experts
from moe_prism.errors import PrismError
from moe_prism.evaluation.environment import machine, versions
from moe_prism.evaluation.measure import Run, measure
from moe_prism.evaluation.points import paired_difference
from moe_prism.evaluation.text import text_name
from moe_prism.experts import find_expert_layers
from moe_prism.refactor import load_stock, refactor_model
from moe_prism.refactor.calibration import load_calibration
from moe_prism.refactor.demo import PAPER

N = 4
ORIGINAL, CG, LG, OURS = "original", "CG", "LG, no finetuning", "ours"
# Table of the paper by model and K: original top-K', CG, LG without finetuning.
PUBLISHED: dict[str, dict[int, tuple[float, float, float]]] = {
    "OLMoE-1B-7B-0924": {
        12: (15.72, 14.89, 15.71), 16: (12.11, 11.95, 12.11), 20: (10.51, 10.51, 10.50), 24: (9.73, 9.76, 9.73),
    },
    "DeepSeek-V2-Lite": {8: (11.12, 11.11, 11.11), 12: (9.99, 10.00, 9.99), 16: (9.63, 9.64, 9.63)},
    "Qwen3-30B-A3B": {12: (18.23, 15.05, 18.23), 16: (13.74, 12.90, 13.72), 20: (12.31, 12.05, 12.30)},
}  # fmt: skip
RECIPES = {CG: PAPER["paper: proxy"], LG: PAPER["paper: linear"]}


def published(model: str) -> dict[int, tuple[float, float, float]]:
    """The paper's rows of a model, by the end of its name; empty for any other."""
    return PUBLISHED.get(model.rstrip("/").rsplit("/", 1)[-1], {})


def budgets_of(asked: list[int] | None, model: str, full: int) -> list[int]:
    """The K to measure: those asked for, else the paper's, else what is left of 12, 16, 20, 24 below full budget."""
    found = asked or sorted(published(model)) or [k for k in (12, 16, 20, 24) if k < full]
    bad = [k for k in found if not 1 <= k < full or k % N]
    if bad or not found:
        raise PrismError(f"budgets must be multiples of {N} below {full} (full budget at N = {N}), got {bad or found}")
    return found


def measured(args: argparse.Namespace, column: str) -> dict[str, Any]:
    """Perplexity of a column at every K, and of the full model."""
    model, tokenizer = load_stock(args.model, compute_dtype(args.dtype))
    full = find_expert_layers(model)[0].top_k * N
    budgets = budgets_of(args.budgets, args.model, full)
    held, name = load_calibration(args.text, tokenizer, model, args.tokens, args.context + 1, 0)
    settings = {k: f"{k // N} experts" for k in budgets}
    costs = {k: k / full for k in budgets}
    if column == ORIGINAL:
        runs = {k: Run(str(k), partial(routed_experts, model, k // N)) for k in budgets}
    else:
        changes = RECIPES.get(column) or Recipe.load(args.recipe).model_dump() | {"points": []}
        sizes = {"num_sub_experts": N} if column in RECIPES else {}
        chosen = Recipe.of({"calibration_tokens": args.calibration_tokens, "seed": args.seed} | changes | sizes)
        out = args.out / "work" / column.replace(", ", "-").replace(" ", "-")
        out.parent.mkdir(parents=True, exist_ok=True)
        done, work = refactor_model(model, tokenizer, chosen, out, args.calibration)
        attach(model, done.elastic, done.tensors)
        work.remove()
        own = {k: k if column in RECIPES else budget_within(model, k / full) for k in budgets}
        runs = {k: Run(str(k), partial(budget, model, mine)) for k, mine in own.items() if mine is not None}
        settings = {k: f"budget {mine} of {full_budget(model)}" for k, mine in own.items() if mine is not None}
        costs = {k: max(cost_shares(model, mine)) for k, mine in own.items() if mine is not None}
    results = measure(model, held, [Run("full", None), *runs.values()], batch_size=args.batch)
    cells = {}
    for k, run in runs.items():
        excess, error = paired_difference(results[run.name].nll, results["full"].nll)
        cells[str(k)] = {
            "perplexity": perplexity(results[run.name].mean_nll), "excess_nats": round(excess, 6),
            "stderr": round(error, 6), "kl": round(results[run.name].kl, 6), "cost": round(costs[k], 4),
            "setting": settings[k],
        }  # fmt: skip
    return {
        "column": column, "cells": cells, "full": perplexity(results["full"].mean_nll), "text": name,
        "tokens": len(results["full"].nll), "machine": machine(model),
    }  # fmt: skip


def perplexity(nll: float) -> float:
    """exp, to four digits."""
    return round(math.exp(nll), 4)


def table(record: dict[str, Any]) -> str:
    """Markdown: ours and the paper's figures side by side."""
    columns, theirs = record["columns"], published(record["settings"]["model"])
    first = columns[0]
    lines = [
        f"# {record['settings']['model']}, N = {N}", "",
        f"Perplexity on {first['tokens']:,} tokens of {first['text']} in windows of {record['settings']['context']}; "
        f"the full model {first['full']:.2f}. In brackets: cost over full, scoring included. "
        "The paper's figures are those of arXiv 2510.19366.", "",
        "| K | " + " | ".join(c["column"] for c in columns) + " | paper: original | paper: CG | paper: LG |",
        "|" + "---|" * (4 + len(columns)),
    ]  # fmt: skip
    for k in sorted({int(k) for column in columns for k in column["cells"]}):
        found = [column["cells"].get(str(k)) for column in columns]
        cells = ["" if cell is None else f"{cell['perplexity']:.2f} ({cell['cost']:.3f})" for cell in found]
        cells += [f"{value:.2f}" for value in theirs[k]] if k in theirs else [""] * 3
        lines.append(f"| {k} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"`{record['command']}`", ""])


def main() -> int:
    """Measure the columns that are missing, then write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory, or a name on the hub")
    parser.add_argument(
        "--text", default="Salesforce/wikitext:wikitext-2-raw-v1:test", help="file, or data set of the hub"
    )
    parser.add_argument(
        "--calibration", default="Salesforce/wikitext:wikitext-2-raw-v1:train", help="file, or data set"
    )
    parser.add_argument("--recipe", type=Path, default=Path("recipes/gate-first.yaml"), help="of the column ours")
    parser.add_argument("--budgets", type=int, nargs="+", help="K; by default the paper's for this model")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--context", type=int, default=2048, help="predicted tokens of a window")
    parser.add_argument("--calibration-tokens", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=1, help="windows of a forward pass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--out", type=Path, default=Path("build/reproduce"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "reproduce.json"
    settings = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name != "out"
    } | {"model": args.model if not Path(args.model).exists() else text_name(args.model)}
    record: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]), "settings": settings, "versions": versions(), "columns": [],
        "published": {str(k): row for k, row in published(args.model).items()},
    }  # fmt: skip
    if file.exists() and (before := json.loads(file.read_text()))["settings"] == settings:
        record["columns"] = before["columns"]
    try:
        for column in (ORIGINAL, CG, LG, OURS):
            if not any(each["column"] == column for each in record["columns"]):
                print(f"measuring: {column}", file=sys.stderr, flush=True)
                record["columns"].append(measured(args, column))
                replace_file(file, (json.dumps(record, indent=1) + "\n").encode())
    except PrismError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = table(record)
    replace_file(file.with_suffix(".md"), text.encode())
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""``moe-prism demo``: the whole way on the bundled model, from stock checkpoint to text at three budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import bars, out
from .refactor import STAGES

PROMPT = "The old captain looked at the sea and said"


def demo(
    output: Annotated[Path, typer.Option("--out", help="Folder for checkpoint and report.")] = Path("build/demo"),
    model: Annotated[Path, typer.Option(help="Stock model.")] = Path("models/reference"),
    calibration: Annotated[Path | None, typer.Option(help="Calibration text. Without: the model writes it.")] = None,
    text: Annotated[Path | None, typer.Option(help="Held-out text. Without: the model writes it.")] = None,
    second_text: Annotated[Path | None, typer.Option(help="A second one, to tell which points are stable.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Recipe, YAML; the default one without.")] = None,
    tokens: Annotated[int, typer.Option(min=512, help="Tokens of each held-out text.")] = 4_608,
) -> None:
    """Refactor, measure, report and generate with the bundled reference model, in a few minutes.

    An earlier demo in the same folder is replaced.

    Example: moe-prism demo --out build/demo
    """
    from ..errors import PrismError
    from ..refactor.recipe import Recipe

    if not (model / "config.json").is_file():
        raise PrismError(f"no model at {model}; run the demo from a clone of the repository, or name one with --model")
    chosen = Recipe.load(recipe) if recipe else Recipe()
    from ..elastic import set_budget
    from ..evaluation.table import frontier_table
    from ..refactor.demo import run_demo
    from .console import compute_dtype, quiet
    from .generate import continue_text

    quiet()
    with bars(STAGES) as tell:
        result = run_demo(
            model,
            output,
            chosen,
            calibration=calibration,
            text=text,
            second_text=second_text,
            tokens=tokens,
            dtype=compute_dtype("auto"),
            progress=tell,
        )
    full = result.points.full_budget
    out.print(frontier_table(result.points))
    for k_active in sorted({full, max(1, full // 2), max(1, full // 4)}, reverse=True):
        out.rule(f"budget {k_active} of {full}")
        set_budget(result.model, k_active)
        words = continue_text(result.model, result.tokenizer, PROMPT, 40, temperature=0.7, seed=0)
        out.print(words, markup=False, soft_wrap=True)
    out.rule()
    out.print(f"checkpoint: {output / 'elastic'}\nreport: {output / 'report' / 'index.html'}", soft_wrap=True)

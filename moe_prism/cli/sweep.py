"""``moe-prism sweep``: measure the operating points of a checkpoint."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from .console import Dtype, bars, out


def parse_budgets(text: str | None, option: str = "--budgets") -> list[int] | None:
    """``"4,8,12"`` -> numbers; raises PrismError for anything else."""
    from ..errors import PrismError

    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise PrismError(f"{option} must be whole numbers with commas between, such as 4,8,12; got {text!r}") from None


def sweep(
    checkpoint: Annotated[Path, typer.Argument(help="Elastic checkpoint.")],
    text: Annotated[
        Path | None, typer.Option(help="Held-out text: file or folder. Without: text sampled from the model.")
    ] = None,
    second_text: Annotated[Path | None, typer.Option(help="Another text, to tell which points are stable.")] = None,
    second: Annotated[
        Path | None, typer.Option(help="The same model refactored with another seed, to tell which are stable.")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="The original model, to compare logits at full budget.")] = None,
    budgets: Annotated[str | None, typer.Option(help="Such as 4,8,12; by default the recipe's points.")] = None,
    phases: Annotated[
        str | None, typer.Option(help="Such as 8,16,32: also measure every pair of budgets of prompt and continuation.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of each text.")] = 65_536,
    context: Annotated[int, typer.Option(min=8, help="Tokens of a window.")] = 256,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the points here.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write plots and a page into this folder.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights in memory.")] = "auto",
) -> None:
    """Measure loss, KL, agreement and cost of every budget, and of the original with fewer experts.

    When no budgets are named, the result and its plot become part of the checkpoint. What is interrupted goes on where
    it was when the same command is given again: until then CHECKPOINT.sweep beside it has what was measured.

    Example: moe-prism sweep olmoe-elastic --text wiki.test.txt --second-text books.txt --json points.json
    """
    from ..checkpoint.read import open_checkpoint

    asked, paired = parse_budgets(budgets), parse_budgets(phases, "--phases")
    opened = open_checkpoint(checkpoint)
    from ..refactor.recipe import Recipe

    published = Recipe.parse(opened.recipe(), f"recipe of {checkpoint}").budgets(opened.elastic.full_budget)
    from ..checkpoint.checksums import SUMS_FILE
    from ..elastic import load_elastic
    from ..evaluation.environment import versions
    from ..evaluation.kept import Kept
    from ..evaluation.report import write_report
    from ..evaluation.sampling import sampled_text
    from ..evaluation.save import save_points
    from ..evaluation.sweep import sweep as measure_sweep
    from ..evaluation.table import frontier_table, phases_table
    from .console import compute_dtype, load_tokenizer, quiet

    quiet()
    kind = compute_dtype(dtype)
    model = load_elastic(checkpoint, dtype=kind, verify=False)
    tokenizer = load_tokenizer(str(checkpoint))
    other = load_elastic(second, dtype=kind) if second else None
    original = None
    if reference:
        from ..refactor import load_stock

        original, _ = load_stock(reference, kind)
    measured = [checkpoint] if second is None else [checkpoint, second]
    sums = [(folder / SUMS_FILE).read_text() for folder in measured]
    kept = Kept(
        checkpoint.resolve().with_name(f"{checkpoint.resolve().name}.sweep"), json.dumps([str(kind), versions(), *sums])
    )
    with bars({}) as tell, ExitStack() as stack:
        if text is None:
            text = stack.enter_context(
                sampled_text(model, tokenizer, tokens, seed=1, progress=partial(tell, "sampling"))
            )
        result = measure_sweep(
            model,
            tokenizer,
            text,
            seed=opened.elastic.seed,
            budgets=asked or published,
            tokens=tokens,
            context=context,
            second_text=second_text,
            second_model=other,
            second_seed=open_checkpoint(second, verify=False).elastic.seed if second else None,
            reference=original,
            phases=paired,
            progress=tell,
            kept=kept,
        )
    out.print(frontier_table(result.points))
    if result.points.phases is not None:
        out.print(phases_table(result.points.phases))
    if json_file:
        from ..checkpoint.atomic import replace_file

        replace_file(json_file, result.points.to_json().encode())
    if report:
        write_report(report, result.points, opened.recipe(), checkpoint.resolve().name)
    if asked is None:
        save_points(opened, result.points)
    kept.forget()

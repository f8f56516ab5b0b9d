"""``moe-prism refactor``: a stock checkpoint becomes an elastic one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import Dtype, bars, err, out

STAGES = {
    "sample": "sampling calibration text",
    "capture": "running calibration text",
    "layers": "partitioning layers",
    "spend": "choosing how budgets are spent",
    "fold": "fitting what runs to what does not",
    "compensate": "fitting what budgets leave out",
    "thresholds": "fitting thresholds of tokens",
    "sharing": "choosing how far tokens share",
    "methods": "trying methods",
    "points": "choosing points to publish",
    "layer budgets": "spreading budgets over layers",
    "finetune": "finetuning the gate",
}


def refactor(
    model: Annotated[str, typer.Argument(help="Model directory, or a model name of the hub. It is only read.")],
    output: Annotated[Path, typer.Argument(help="New directory for the elastic checkpoint.")],
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe, YAML, or auto. Options below override its fields."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Calibration text: file, folder or data set of the hub. Without: the model writes it."),
    ] = None,
    num_sub_experts: Annotated[
        int | None, typer.Option("--num-sub-experts", "-n", help="Sub-experts of an expert.")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="Partitioning solver.")] = None,
    gate: Annotated[str | None, typer.Option(help="Gate.")] = None,
    calibration_tokens: Annotated[int | None, typer.Option(help="Calibration tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling and solver.")] = None,
    time_limit: Annotated[float | None, typer.Option(help="Of recipe auto, in seconds.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights while computing; stored ones keep theirs.")] = "auto",
) -> None:
    """Turn a stock MoE checkpoint into an elastic one that equals it at full budget.

    A run that was interrupted goes on where it stopped when the same command is given again.

    Example: moe-prism refactor allenai/OLMoE-1B-7B-0924 olmoe-elastic --text wikitext.txt
    """
    from ..refactor.recipe import Recipe

    fields: dict[str, Any] = {"methods": "auto"} if recipe == Path("auto") else {}
    if recipe and not fields:
        fields = Recipe.load(recipe).model_dump()
    given = {
        "num_sub_experts": num_sub_experts,
        "solver": solver,
        "gate": gate,
        "calibration_tokens": calibration_tokens,
        "seed": seed,
        "time_limit": time_limit,
    }
    chosen = Recipe.of(fields | {name: value for name, value in given.items() if value is not None})
    from ..evaluation.table import choice_table
    from ..refactor import make_elastic
    from ..refactor.finetune_tensors import trained_share
    from .console import compute_dtype, quiet

    quiet()
    with bars(STAGES) as tell:
        done = make_elastic(model, output, chosen, text=text, compute_dtype=compute_dtype(dtype), progress=tell)
    for report in done.reports:
        if report.fallbacks:
            err.print(
                f"warning: {report.name}: experts {', '.join(map(str, report.fallbacks))} were reached by fewer than "
                f"{chosen.min_tokens_per_expert} calibration tokens and were profiled on other tokens"
            )
    if done.elastic.choice is not None:
        out.print(choice_table(done.elastic.choice))
    if chosen.finetune is not None:
        count, share = trained_share(done.tensors, done.model)
        out.print(f"finetuned: {count:,} values beside the model, {share:.2%} as many as it has parameters")
    out.print(
        f"{output}: budgets 1..{done.elastic.full_budget}, full budget equals {model}. "
        f"Measure it: moe-prism sweep {output}",
        soft_wrap=True,
    )

"""``moe-prism inspect``: what a checkpoint is, without loading its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .console import out


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Elastic checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verify: Annotated[bool, typer.Option(help="Compare the files with their checksums.")] = True,
) -> None:
    """Show sizes, gate, recipe, checksums and measured operating points.

    Example: moe-prism inspect olmoe-elastic --json
    """
    from ..checkpoint.inspect import describe

    summary = describe(checkpoint, verify=verify)
    if as_json:
        print(json.dumps(summary, indent=1))
        return
    from ..checkpoint.read import open_checkpoint
    from ..evaluation.table import choice_table, frontier_table

    for name, value in summary.items():
        if not isinstance(value, dict | list):
            out.print(f"[bold]{name}[/bold]: {value}", soft_wrap=True)
    opened = open_checkpoint(checkpoint, verify=False)
    if opened.elastic.choice is not None:
        out.print(choice_table(opened.elastic.choice))
    points = opened.operating_points()
    if points is not None:
        out.print(frontier_table(points))

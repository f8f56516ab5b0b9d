"""``moe-prism export``: an elastic checkpoint for engines that know nothing of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .console import out


def export(
    checkpoint: Annotated[Path, typer.Argument(help="Elastic checkpoint; it is only read.")],
    output: Annotated[Path, typer.Argument(help="New directory.")],
    kind: Annotated[Literal["fine-grained"], typer.Option("--format", help="Every sub-expert an expert.")] = (
        "fine-grained"
    ),
    k_active: Annotated[int | None, typer.Option(help="Experts of a token; full budget by default.")] = None,
) -> None:
    """Write an ordinary checkpoint with E x N small experts and the linear gate as its router.

    transformers, vLLM and others load it as any model of its family; num_experts_per_tok in config.json is the dial.
    Gates other than linear, neurons chosen inside sub-experts, compensation and folding stay behind, as they need
    moe-prism.

    Example: moe-prism export olmoe-elastic olmoe-fine --format fine-grained --k-active 16
    """
    from ..refactor.export import export_fine_grained
    from .console import quiet

    quiet()
    done = export_fine_grained(checkpoint, output, k_active)
    out.print(f"{output}: {kind}, {done.num_experts} experts, {done.k_active} of them for a token", soft_wrap=True)
    if done.renormalises:
        out.print(
            "this family renormalises routing weights: exact at full budget, approximate below; measure before use",
            soft_wrap=True,
        )

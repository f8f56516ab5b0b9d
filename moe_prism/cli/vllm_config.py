"""``moe-prism vllm-config``: what ``vllm serve`` needs to serve a checkpoint with budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import out


def vllm_config(
    checkpoint: Annotated[Path, typer.Argument(help="Elastic checkpoint.")],
    output: Annotated[Path | None, typer.Option("--out", help="Write the file here; printed by default.")] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; the directory's name.")] = None,
    policy: Annotated[str, typer.Option(help="Scheduling policy that gives budgets.")] = "continuous",
    k_min: Annotated[int | None, typer.Option(min=1, help="Floor of requests that name none; full budget.")] = None,
    cost_model: Annotated[Path | None, typer.Option(help="Cost model of vLLM on this machine.")] = None,
) -> None:
    """Write one file of settings: vLLM then answers ``vllm_xargs`` with budgets, through the plugin of this package.

    Example: moe-prism vllm-config olmoe-elastic --out vllm.yaml && vllm serve --config vllm.yaml
    """
    from ..errors import PrismError
    from ..scheduling import POLICIES
    from ..vllm_plugin.config_file import config_text
    from ..vllm_plugin.setup import Options

    POLICIES.get(policy)
    if cost_model is not None:
        from ..scheduling.cost_file import read_cost_model

        read_cost_model(cost_model)
    if output is not None and output.suffix not in (".yaml", ".yml"):
        raise PrismError(f"--out must end in .yaml, which vLLM asks for, got {output}")
    cost = None if cost_model is None else str(cost_model.resolve())
    text = config_text(checkpoint, Options(policy, k_min, cost), name)
    if output is None:
        out.print(text, end="", soft_wrap=True, highlight=False, markup=False)
        return
    from ..checkpoint.atomic import replace_file

    replace_file(output, text.encode())
    out.print(f"{output}: start with `vllm serve --config {output}`", soft_wrap=True)

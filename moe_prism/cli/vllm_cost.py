"""``moe-prism vllm-cost``: measure once how long vLLM's steps take on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Dtype, bars, out


def vllm_cost(
    checkpoint: Annotated[Path, typer.Argument(help="Elastic checkpoint.")],
    output: Annotated[Path, typer.Option("--out", help="Write the cost model here.")],
    max_batch: Annotated[int, typer.Option(min=1, help="Most requests that decode at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Of prompts, order and the steps held out of the fit.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights in memory, as it will serve.")] = "auto",
    eager: Annotated[bool, typer.Option(help="Without compiled graphs, as it will serve.")] = False,
    max_model_len: Annotated[int, typer.Option(min=64, help="Longest request.")] = 2048,
) -> None:
    """Measure steps of many kinds in vLLM and fit the cost model of its policy. Runs where vLLM is installed.

    Example: moe-prism vllm-cost olmoe-elastic --out vllm-cost.json
    """
    from ..scheduling.cost_file import write_cost_model
    from ..vllm_plugin.profile import Grid, profile
    from .console import quiet

    quiet()
    batches = tuple(sorted({*(2**i for i in range(max_batch.bit_length())), max_batch}))
    options = {"dtype": dtype, "enforce_eager": eager, "max_model_len": max_model_len, "kv_cache_memory_bytes": 2 << 30}
    with bars({}) as tell:
        found = profile(checkpoint, Grid(batches=batches, seed=seed), options, tell)
    write_cost_model(output, found)
    out.print(
        f"{output}: {len(found.measured)} steps on {found.machine}; held-out error {found.median_error:.1%} median, "
        f"{found.p95_error:.1%} p95. Serve with `moe-prism vllm-config {checkpoint} --cost-model {output}`",
        soft_wrap=True,
    )

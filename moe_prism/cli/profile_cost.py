"""``moe-prism profile-cost``: measure once how long steps take on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Dtype, bars, out


def profile_cost(
    checkpoint: Annotated[Path, typer.Argument(help="Elastic checkpoint.")],
    max_batch: Annotated[int, typer.Option(min=1, help="Most requests that decode at once.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Times that each step is measured; the median counts.")] = 5,
    seed: Annotated[int, typer.Option(help="Of prompts, order and the steps held out of the fit.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights in memory, as it will serve.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the cost model here as well.")] = None,
) -> None:
    """Measure steps of many kinds and store the cost model in the checkpoint. Interrupt it and it goes on later.

    Example: moe-prism profile-cost olmoe-elastic
    """
    from ..checkpoint.read import open_checkpoint

    opened = open_checkpoint(checkpoint)
    from ..bench.profile_cost import Grid
    from ..bench.profile_cost import profile_cost as measure
    from ..elastic import load_elastic
    from ..scheduling.cost_file import save_cost_model, write_cost_model
    from .console import compute_dtype, quiet

    quiet()
    batches = tuple(sorted({*(2**i for i in range(max_batch.bit_length())), max_batch}))
    grid = Grid(batches=batches, repeats=repeats, seed=seed)
    model = load_elastic(checkpoint, dtype=compute_dtype(dtype), verify=False)
    partial = checkpoint.with_name(f".{checkpoint.resolve().name}.profile-cost.json")
    with bars({}) as tell:
        found = measure(model, opened.fingerprint(), grid, partial, tell)
    save_cost_model(opened, found)
    if json_file:
        write_cost_model(json_file, found)
    full, half = found.full_budget, max(1, found.full_budget // 2)
    for batch in (1, max_batch):
        times = ", ".join(f"{found.table(batch, k, 128) * 1e3:.1f} ms at {k}" for k in (full, half, max(1, full // 8)))
        out.print(f"decoding {batch}, 128 tokens each: {times} sub-experts")
    out.print(
        f"{len(found.measured)} steps on {found.machine}; held-out error {found.median_error:.1%} median, "
        f"{found.p95_error:.1%} p95"
    )

"""``moe-prism bench``: measurements on the real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Dtype, bars, out
from .scenario import scenario_of, show

bench = typer.Typer(help="Measure on the real engine.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Keeps the name of a single command."""


@bench.command(no_args_is_help=True)
def schedule(
    checkpoint: Annotated[Path, typer.Argument(help="Elastic checkpoint with a cost model of this machine.")],
    trace: Annotated[Path | None, typer.Option(help="CSV: TIMESTAMP, ContextTokens, GeneratedTokens.")] = None,
    policies: Annotated[
        str, typer.Option(help="With commas between; all by default. NAME@LOAD+LOAD runs on these loads only.")
    ] = "",
    loads: Annotated[str, typer.Option(help="Multiples of what full budget sustains.")] = "low=0.3,medium=0.7,high=1.5",
    trace_load: Annotated[float, typer.Option(help="Mean load of the trace, the same multiple.")] = 1.5,
    seconds: Annotated[float, typer.Option(help="How long requests come in each run.")] = 12.0,
    rounds: Annotated[int, typer.Option(min=1, help="Times that everything is run.")] = 1,
    length_scale: Annotated[float, typer.Option(help="The trace's tokens are multiplied by this.")] = 0.1,
    floors: Annotated[str, typer.Option(help="Shares of full budget with weights.")] = "0.25=0.4,0.5=0.4,1=0.2",
    ttft_ms: Annotated[float, typer.Option(help="Objective: time to first token.")] = 1000.0,
    tpot_ms: Annotated[float, typer.Option(help="Objective: time per output token.")] = 100.0,
    max_running: Annotated[int, typer.Option(help="Requests that run at once.")] = 32,
    max_prefill: Annotated[int | None, typer.Option(help="Prompt tokens of one step at most.")] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths, floors and prompts.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights in memory.")] = "auto",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write pictures into this folder.")] = None,
) -> None:
    """Compare policies under open-loop load on the engine, with the simulator beside it. It goes on if interrupted.

    Example: moe-prism bench schedule olmoe-elastic --json schedule.json
    """
    from ..bench.measured import run_measurement
    from ..checkpoint.read import open_checkpoint

    scenario = scenario_of(
        checkpoint=checkpoint,
        trace=trace,
        policies=policies,
        loads=loads,
        trace_load=trace_load,
        seconds=seconds,
        length_scale=length_scale,
        floors=floors,
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        max_running=max_running,
        max_prefill=max_prefill,
        seed=seed,
    )
    opened = open_checkpoint(checkpoint)
    from ..elastic import load_elastic
    from ..engine.identity import ENGINE, machine_of
    from ..scheduling.cost_file import load_cost_model
    from .console import compute_dtype, quiet

    quiet()
    model = load_elastic(checkpoint, dtype=compute_dtype(dtype), verify=False)
    cost = load_cost_model(opened, engine=ENGINE, machine=machine_of(model))
    partial = checkpoint.with_name(f".{checkpoint.resolve().name}.bench-schedule.json")
    with bars({}) as tell:
        record = run_measurement(scenario, model, cost, rounds, tell, partial)
    show(record, cost, json_file, plots)
    for name, value in record["targets"].items():
        out.print(f"{name}: {value:.3g}")

"""``moe-prism simulate``: scheduling policies side by side, over a measured cost model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .console import bars, out
from .scenario import scenario_of, show


def simulate(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Elastic checkpoint whose cost model and operating points are used.")
    ] = None,
    cost: Annotated[Path | None, typer.Option(help="Cost model file instead of the checkpoint's.")] = None,
    points: Annotated[Path | None, typer.Option(help="operating_points.json instead of the checkpoint's.")] = None,
    trace: Annotated[Path | None, typer.Option(help="CSV: TIMESTAMP, ContextTokens, GeneratedTokens.")] = None,
    policies: Annotated[
        str, typer.Option(help="With commas between; all by default. NAME@LOAD+LOAD runs on these loads only.")
    ] = "",
    loads: Annotated[str, typer.Option(help="Multiples of what full budget sustains.")] = "low=0.3,medium=0.7,high=1.5",
    trace_load: Annotated[float, typer.Option(help="Mean load of the trace, the same multiple.")] = 1.5,
    seconds: Annotated[float, typer.Option(help="How long Poisson arrivals come.")] = 300.0,
    length_scale: Annotated[float, typer.Option(help="The trace's tokens are multiplied by this.")] = 0.1,
    requests: Annotated[int | None, typer.Option(help="First requests of the trace.")] = None,
    floors: Annotated[str, typer.Option(help="Shares of full budget with weights.")] = "0.25=0.4,0.5=0.4,1=0.2",
    ttft_ms: Annotated[float, typer.Option(help="Objective: time to first token.")] = 1000.0,
    tpot_ms: Annotated[float, typer.Option(help="Objective: time per output token.")] = 100.0,
    max_running: Annotated[int, typer.Option(help="Requests that run at once on a replica.")] = 32,
    max_prefill: Annotated[int | None, typer.Option(help="Prompt tokens of one step at most.")] = None,
    memory_tokens: Annotated[int | None, typer.Option(help="Tokens that fit into a replica's memory.")] = None,
    hopeless: Annotated[
        Literal["serve", "refuse"], typer.Option(help="Objectives that no budget can meet: serve at the floor, marked.")
    ] = "serve",
    replicas: Annotated[int, typer.Option(help="Engines behind the router.")] = 1,
    lanes: Annotated[str, typer.Option(help="Ascending floors; replicas are dealt to them. Mixed by default.")] = "",
    repeat: Annotated[int, typer.Option(help="Steps for which a plan holds while nothing changes; faster.")] = 1,
    seed: Annotated[int, typer.Option(help="Of arrivals, lengths and floors.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write pictures into this folder.")] = None,
) -> None:
    """Compare policies on Poisson arrivals and on a recorded trace, without an engine.

    Prompts and outputs of the Poisson loads are drawn from the trace, or are 16 to 256 and 8 to 128 tokens long.

    Example: moe-prism simulate olmoe-elastic --trace azure-llm-2023-conv.csv --json simulate.json
    """
    from ..bench.scenario import run_simulation
    from ..bench.tables import ablation_table
    from .sweep import parse_budgets

    scenario = scenario_of(
        checkpoint=checkpoint,
        cost=cost,
        points=points,
        trace=trace,
        policies=policies,
        loads=loads,
        trace_load=trace_load,
        seconds=seconds,
        length_scale=length_scale,
        requests=requests,
        floors=floors,
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        max_running=max_running,
        max_prefill=max_prefill,
        memory_tokens=memory_tokens,
        hopeless=hopeless,
        replicas=replicas,
        lanes=parse_budgets(lanes or None),
        repeat=repeat,
        seed=seed,
    )
    with bars({}) as tell:
        record, model = run_simulation(scenario, tell)
    show(record, model, json_file, plots)
    ablation = ablation_table(record)
    if ablation is not None:
        out.print(ablation)

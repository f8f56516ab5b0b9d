"""The frontier as a table for the terminal.

Knows only the content of operating_points.json.
"""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from moe_prism.checkpoint.schema import BaselinePoint, Choice, OperatingPoint, OperatingPoints, Phases


def frontier_table(points: OperatingPoints) -> Table:
    """Elastic budgets and, below a rule, the original model with fewer experts, at ascending share of routed work."""
    table = Table(
        title=f"Operating points on {points.text} ({points.tokens:,} tokens)",
        caption=_caption(points),
        caption_justify="left",
        box=SIMPLE_HEAD,  # fits a terminal of 80 columns; the page and the JSON have the rest
        padding=(0, 1),
    )
    for heading in ("budget", "cost", "loss", "over full", "perplexity", "KL", "top-1"):
        table.add_column(heading, justify="right")
    table.add_column("point")
    full = full_loss(points)
    for point in points.elastic:
        table.add_row(f"{point.k_active}/{points.full_budget}", f"{point.flops_share:.3f}", *_cells(point, full))
    table.add_section()
    for other in points.baseline:
        # the original's router is its only gate, so its cost is its share
        table.add_row(f"top-{other.k}", f"{other.share:.3f}", *_cells(other, full), style="dim")
    return table


def phases_table(phases: Phases) -> Table:
    """Excess loss of continuation tokens: a row for every budget of the prompt, a column for every one after it."""
    budgets = sorted({point.prefill for point in phases.points})
    table = Table(
        title=f"Continuations on {phases.text} ({phases.tokens:,} tokens after prompts of {phases.prompt_tokens})",
        caption="Loss over full in nats per token, by budget of the prompt (rows) and of the continuation (columns).",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
    )
    for heading in ("prompt", *map(str, budgets)):
        table.add_column(heading, justify="right")
    for prefill in budgets:
        cells = [f"{point.excess:+.4f}" for point in phases.points if point.prefill == prefill]
        table.add_row(str(prefill), *cells)
    return table


def choice_table(choice: Choice) -> Table:
    """What recipe auto tried, on top of what it had kept so far, and why each was kept or not."""
    table = Table(
        title=f"Methods tried on {choice.tokens:,} held-out tokens of {choice.text}",
        caption="KL to the full model at shares of the routed work; each method on top of those kept above it.",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1),
    )
    table.add_column("method")
    for heading in (*(f"{share:.0%}" for share in choice.shares), "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("outcome")
    for each in choice.tries:
        cells = [f"{kl:.4f}" for kl in each.kl] or [""] * len(choice.shares)
        table.add_row(each.name, *cells, f"{each.seconds:.0f}", each.outcome)
    return table


def full_loss(points: OperatingPoints) -> float | None:
    """Mean token loss of the full model in nats, from whichever series measured it."""
    for point in (*points.elastic[-1:], *points.baseline[-1:]):
        if point.share == 1:
            return point.nll
    return None


def _cells(point: OperatingPoint | BaselinePoint, full: float | None) -> list[str]:
    over = "" if full is None else f"{point.nll - full:+.4f}"
    return [
        f"{point.nll:.4f}",
        over,
        f"{point.ppl:.2f}",
        f"{point.kl:.4f}",
        f"{point.top1_agreement:.1%}",
        ("D" if point.distinct else "-") + ("S" if point.stable else "-" if point.stable is False else "?"),
    ]


def _caption(points: OperatingPoints) -> str:
    counts = points.distinct_stable
    if counts.elastic is None or counts.baseline is None:
        return "Stability was not measured: it needs a second text and a second calibration seed."
    return (
        f"Cost: share of routed FLOPs, gate included. D distinct, S stable: {counts.elastic} elastic points and "
        f"{counts.baseline} of the original are both."
    )

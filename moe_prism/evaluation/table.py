"""The frontier as a table for the terminal.

Knows only the content of operating_points.json.
"""

from __future__ import annotations

from rich.table import Table

from moe_prism.checkpoint.schema import BaselinePoint, OperatingPoint, OperatingPoints


def marks(point: OperatingPoint | BaselinePoint) -> str:
    """``distinct, stable`` in words: what holds; a dash where neither does, a question mark for unknown stability."""
    words = ["distinct"] if point.distinct else []
    if point.stable is None:
        words.append("stable?")
    elif point.stable:
        words.append("stable")
    return ", ".join(words) or "-"


def frontier_table(points: OperatingPoints) -> Table:
    """Elastic budgets and, below a rule, the original model with fewer experts, at ascending share of routed work."""
    table = Table(
        title=f"Operating points on {points.text} ({points.tokens:,} tokens)",
        caption=_caption(points),
        caption_justify="left",
    )
    for heading in ("budget", "share", "FLOPs", "bytes", "loss", "over full", "ppl", "KL", "top-1"):
        table.add_column(heading, justify="right")
    table.add_column("operating point")
    full = full_loss(points)
    for point in points.elastic:
        costs = (f"{point.flops_share:.3f}", f"{point.bytes_share:.3f}")
        table.add_row(f"k_active {point.k_active}", *_cells(point, costs, full))
    table.add_section()
    for other in points.baseline:
        # the original's router is its only gate, so its cost is its share
        table.add_row(f"top-{other.k}", *_cells(other, (f"{other.share:.3f}",) * 2, full), style="dim")
    return table


def full_loss(points: OperatingPoints) -> float | None:
    """Mean token loss of the full model in nats, from whichever series measured it."""
    for point in (*points.elastic[-1:], *points.baseline[-1:]):
        if point.share == 1:
            return point.nll
    return None


def _cells(point: OperatingPoint | BaselinePoint, costs: tuple[str, ...], full: float | None) -> list[str]:
    over = "" if full is None else f"{point.nll - full:+.4f}"
    return [
        f"{point.share:.3f}",
        *costs,
        f"{point.nll:.4f}",
        over,
        f"{point.ppl:.2f}",
        f"{point.kl:.4f}",
        f"{point.top1_agreement:.1%}",
        marks(point),
    ]


def _caption(points: OperatingPoints) -> str:
    counts = points.distinct_stable
    if counts.elastic is None or counts.baseline is None:
        return "Stability was not measured: it needs a second text and a second calibration seed."
    return f"Distinct and stable points: {counts.elastic} elastic, {counts.baseline} of the original model."

"""The frontier as a picture: loss and KL over the share of routed work, as PNG or SVG.

Knows only the content of operating_points.json. Deterministic: the same points give the same bytes with the same
matplotlib.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moe_prism.checkpoint.schema import BaselinePoint, OperatingPoint, OperatingPoints

from .table import full_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Theme = Literal["light", "dark"]
_Point = OperatingPoint | BaselinePoint

# Okabe and Ito's palette, told apart with any colour vision; every series also has its own marker and dash.
_ELASTIC = "#0072B2"
_BASELINE = "#D55E00"
_BESIDE = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_ON_DARK = {_ELASTIC: "#56B4E9", "#56B4E9": "#F0E442"}
_BESIDE_MARKERS = ("s", "^", "v", "P")
_INK = {"light": "#1f2328", "dark": "#e6edf3"}
_GRID = {"light": "#d8dee4", "dark": "#30363d"}
_PAPER = {"light": "#ffffff", "dark": "#0d1117"}

# Below this many nats the scale turns linear, so that zero (the full model) and small gains can be drawn.
_LINEAR_BELOW = 1e-2


@dataclass(frozen=True)
class _Line:
    label: str
    points: Sequence[_Point]
    colour: str
    marker: str
    dash: str
    width: float


def frontier_png(points: OperatingPoints, theme: Theme = "light", title: str | None = None) -> bytes:
    """PNG, 1600 x 760 pixels: sharp at 800 pixels wide, where text stays readable."""
    return _render(points, theme, title, "png")


def frontier_svg(
    points: OperatingPoints, theme: Theme = "light", title: str | None = None, *, stacked: bool = False
) -> bytes:
    """The same picture as SVG with text as outlines, so that it looks alike wherever it is shown.

    Args:
        points: What to draw.
        theme: Colours for a light or a dark page.
        title: Line above the panels; by default the text and its number of tokens; empty for none.
        stacked: One panel below the other, for narrow screens.
    """
    return _render(points, theme, title, "svg", stacked)


def flops(point: _Point) -> float:
    """Share of the original's routed FLOPs, the gate included; the original's own router is not counted for anyone."""
    return point.flops_share if isinstance(point, OperatingPoint) else point.share


def _render(
    points: OperatingPoints, theme: Theme, title: str | None, kind: Literal["png", "svg"], stacked: bool = False
) -> bytes:
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "moe-prism", "font.size": 11, "font.family": "DejaVu Sans"}):
        figure = _figure(points, theme, title, stacked)
        buffer = io.BytesIO()
        # no date and no program version: equal points give equal files
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=200, facecolor=figure.get_facecolor(), metadata=metadata)
    return buffer.getvalue()


def _figure(points: OperatingPoints, theme: Theme, title: str | None, stacked: bool) -> Figure:
    from matplotlib.figure import Figure

    # Figure without pyplot: no global state, no display, always the Agg canvas
    size = (4.6, 7.0) if stacked else (8.0, 3.8)
    figure = Figure(figsize=size, layout="constrained", facecolor=_PAPER[theme])
    loss, divergence = figure.subplots(2, 1) if stacked else figure.subplots(1, 2)
    full = full_loss(points)
    lines = _lines(points, theme)
    _panel(loss, lines, lambda p: p.nll - (full or 0.0), theme)
    _panel(divergence, lines, lambda p: p.kl, theme)
    loss.set_title(
        "Loss over the full model" if full is not None else "Loss", loc="left", fontsize=11, color=_INK[theme]
    )
    loss.set_ylabel("nats per token", color=_INK[theme])
    divergence.set_title("KL(full model ‖ budget)", loc="left", fontsize=11, color=_INK[theme])
    for axes in (loss, divergence):
        axes.set_xlabel("share of routed FLOPs, gate included", color=_INK[theme])
    handles, labels = loss.get_legend_handles_labels()
    loss.legend(
        handles[::-1],
        labels[::-1],
        frameon=False,
        labelcolor=_INK[theme],
        fontsize=9.5,
        loc="lower left",
        handlelength=2.6,
    )
    heading = f"{points.text}, {points.tokens:,} tokens" if title is None else title
    if heading:
        figure.suptitle(heading, x=0.01, ha="left", fontsize=10, color=_INK[theme])
    return figure


def _lines(points: OperatingPoints, theme: Theme) -> list[_Line]:
    """Drawn in this order: ours last, on top."""
    lines = [
        _Line(name, others, _tint(_BESIDE[i % 4], theme), _BESIDE_MARKERS[i % 4], "--", 1.2)
        for i, (name, others) in enumerate(points.paper_gates.items())
    ]
    if points.baseline:
        lines.append(_Line("original, fewer experts", points.baseline, _tint(_BASELINE, theme), "D", "-.", 1.6))
    return [*lines, _Line("moe-prism", points.elastic, _tint(_ELASTIC, theme), "o", "-", 2.2)]


def _panel(axes: Axes, lines: Sequence[_Line], value: Callable[[_Point], float], theme: Theme) -> None:
    lowest = 0.0
    for line in lines:
        ordered = sorted(line.points, key=flops)
        values = [value(point) for point in ordered]
        lowest = min(lowest, *values)
        axes.plot(
            [flops(point) for point in ordered],
            values,
            line.dash,
            marker=line.marker,
            markersize=4.5,
            linewidth=line.width,
            color=line.colour,
            label=line.label,
            clip_on=False,
        )
    axes.set_yscale("symlog", linthresh=_LINEAR_BELOW, linscale=0.6)
    axes.set_ylim(bottom=lowest - _LINEAR_BELOW / 8)  # room for the markers on zero
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(0, max(1.0, *(flops(p) for line in lines for p in line.points)) * 1.02)
    axes.set_facecolor(_PAPER[theme])
    axes.grid(color=_GRID[theme], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK[theme], length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_INK[theme])


def _tint(colour: str, theme: Theme) -> str:
    return _ON_DARK.get(colour, colour) if theme == "dark" else colour

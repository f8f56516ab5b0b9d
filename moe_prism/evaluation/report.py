"""A folder a person can open: operating_points.json, the frontier as PNG and SVG, and a self-contained index.html.

Knows only the content of operating_points.json and the recipe's text.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path

from moe_prism.checkpoint.atomic import replace_file
from moe_prism.checkpoint.schema import BaselinePoint, OperatingPoint, OperatingPoints
from moe_prism.errors import PrismError

from .plot import Theme, flops, frontier_png, frontier_svg
from .table import full_loss

_TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class _Row:
    """One line of the report's table, ready to print."""

    name: str
    series: str
    cells: tuple[str, ...]
    distinct: bool
    stable: bool | None


@dataclass(frozen=True)
class _Headline:
    figure: str
    meaning: str


def write_report(out_dir: str | Path, points: OperatingPoints, recipe_yaml: str, title: str) -> Path:
    """Writes the report; files of an earlier report in the same folder are replaced, each in one step.

    Args:
        out_dir: Made if absent; other files in it are left alone.
        points: What was measured.
        recipe_yaml: The recipe that made the model, shown as it is.
        title: Heading, usually the model's name.

    Returns:
        Path of index.html.

    Raises:
        PrismError: ``out_dir`` is a file or cannot be written to.
    """
    out = Path(out_dir)
    files = {
        "operating_points.json": points.to_json().encode(),
        "frontier.png": frontier_png(points, title=title),
        "frontier.svg": frontier_svg(points, title=title),
        # last: once the page is there, everything it belongs with is
        "index.html": render_html(points, recipe_yaml, title).encode(),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            replace_file(out / name, content)
    except OSError as error:
        raise PrismError(f"report cannot be written to {out} ({error}); name a folder that can") from error
    return out / "index.html"


def render_html(points: OperatingPoints, recipe_yaml: str, title: str) -> str:
    """The page as one HTML document: no scripts, no external resources, light and dark, wide and narrow."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    page: str = environment.get_template("report.html").render(
        title=title,
        points=points,
        headlines=_headlines(points),
        columns=("share", "FLOPs", "bytes", "loss", "over full", "perplexity", "KL", "top-1"),
        rows=_rows(points),
        beside=_rows_beside(points),
        stability_known=points.distinct_stable.elastic is not None,
        recipe=recipe_yaml.strip(),
        pictures={
            f"{theme}_{shape}": _data_uri(frontier_svg(points, theme, title="", stacked=shape == "narrow"))
            for theme in _themes()
            for shape in ("wide", "narrow")
        },
    )
    return page


def _themes() -> tuple[Theme, Theme]:
    return ("light", "dark")


def _headlines(points: OperatingPoints) -> list[_Headline]:
    """The few figures a reader wants first; those that were not measured are left out."""
    found = []
    counts = points.distinct_stable
    if counts.elastic is not None and counts.baseline is not None:
        found.append(
            _Headline(
                f"{counts.elastic} : {counts.baseline}",
                "operating points that are distinct and stable, elastic against the original with fewer experts",
            )
        )
    full = full_loss(points)
    half = [p for p in points.elastic if p.share == 0.5]
    half_baseline = [p for p in points.baseline if p.share == 0.5]
    if full is not None and half:
        against = (
            f"; the original with half of its experts: {half_baseline[0].nll - full:+.4f}" if half_baseline else ""
        )
        found.append(_Headline(f"{half[0].nll - full:+.4f}", f"nats per token lost at half the budget{against}"))
    if half:
        found.append(
            _Headline(f"{half[0].top1_agreement:.1%}", "of tokens keep their most likely successor at half the budget")
        )
    if points.full_budget_max_logit_diff is not None:
        found.append(
            _Headline(
                f"{points.full_budget_max_logit_diff:.2g}",
                "largest logit difference to the original model at full budget",
            )
        )
    return found


def _rows(points: OperatingPoints) -> list[_Row]:
    full = full_loss(points)
    rows = [_row(f"k_active {p.k_active}", "elastic", p, p.bytes_share, full) for p in points.elastic]
    rows += [_row(f"top-{p.k}", "original, fewer experts", p, p.share, full) for p in points.baseline]
    return rows


def _rows_beside(points: OperatingPoints) -> list[_Row]:
    full = full_loss(points)
    return [
        _row(f"k_active {p.k_active}", name, p, p.bytes_share, full)
        for name, others in points.paper_gates.items()
        for p in others
    ]


def _row(name: str, series: str, point: OperatingPoint | BaselinePoint, bytes_share: float, full: float | None) -> _Row:
    cells = (
        f"{point.share:.3f}",
        f"{flops(point):.3f}",
        f"{bytes_share:.3f}",
        f"{point.nll:.4f}",
        "" if full is None else f"{point.nll - full:+.4f}",
        f"{point.ppl:.2f}",
        f"{point.kl:.4f}",
        f"{point.top1_agreement:.1%}",
    )
    return _Row(name, series, cells, point.distinct, point.stable)


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()

"""The plot, the page, the table: complete, self-contained, repeatable."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from moe_prism.checkpoint.schema import OperatingPoints, parse_operating_points
from moe_prism.errors import PrismError
from moe_prism.evaluation import report as report_module
from moe_prism.evaluation.plot import frontier_svg
from moe_prism.evaluation.points import (
    Cost,
    Further,
    Measured,
    Provenance,
    RunResult,
    build_operating_points,
)
from moe_prism.evaluation.report import render_html, write_report
from moe_prism.evaluation.table import frontier_table, full_loss

RECIPE = 'model: a/b\nnote: <b>&amp; quotes"</b>\n'


def series(levels: dict[int, float], full: int) -> dict[int, RunResult]:
    rng = np.random.default_rng(0)
    return {
        k: RunResult((mean + rng.normal(0, 0.01, 500)).astype(np.float32), max(0.0, 2 * (1 - k / full)), k / full)
        for k, mean in levels.items()
    }


def operating_points(budgets: tuple[int, ...] = (1, 4, 8), *, checked: bool = True) -> OperatingPoints:
    elastic = series({k: 4.0 + 2 / k - 2 / 8 for k in budgets}, 8)
    costs = {k: Cost(k / 8, k / 8) for k in budgets}
    baseline = series({1: 4.5, 2: 4.0}, 2)
    return build_operating_points(
        full_budget=8,
        top_k=2,
        elastic=Measured(elastic, costs),
        baseline=baseline,
        provenance=Provenance("books/held-out.txt", 3, {"torch": "2.13.0"}, {"cpu": "a <fast> one", "cores": 2}),
        further=Further("wiki/test.txt", 4, elastic, baseline, elastic) if checked else None,
        beside={"proxy": Measured(series({k: 4.1 + 3 / k for k in budgets}, 8), costs)},
        full_budget_max_logit_diff=2.5e-6,
    )


class Page(HTMLParser):
    """Collects text and every reference to something outside the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.references, self.tags = "", [], []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "srcset", "href", "data", "action")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time, and most tests are not about it."""
    monkeypatch.setattr(report_module, "frontier_png", lambda *_, **__: b"png")
    monkeypatch.setattr(report_module, "frontier_svg", lambda *_, **__: b"<svg/>")


def test_report_folder(tmp_path: Path) -> None:
    points = operating_points()
    page = write_report(tmp_path / "deep" / "report", points, RECIPE, "A model")
    names = {p.name for p in page.parent.iterdir()}
    assert names == {"index.html", "operating_points.json", "frontier.png", "frontier.svg"}
    assert parse_operating_points((page.parent / "operating_points.json").read_bytes()) == points
    png = (page.parent / "frontier.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">II", png[16:24]) == (1600, 760)
    assert ElementTree.fromstring((page.parent / "frontier.svg").read_bytes()).tag.endswith("svg")


@pytest.mark.usefixtures("no_pictures")
def test_page_is_self_contained_and_complete() -> None:
    points = operating_points()
    html = render_html(points, RECIPE, "A <model> & more")
    page = Page(html)
    assert len(page.references) == 4  # wide and narrow, light and dark
    assert all(r.startswith("data:image/svg+xml;base64,") for r in page.references)
    assert "script" not in page.tags
    assert "@import" not in html
    assert "url(" not in html
    for expected in (
        "A <model> & more",
        RECIPE.strip(),
        "books/held-out.txt",
        "wiki/test.txt",
        "a <fast> one",
        "2.13.0",
        "2.5e-06",
        *(f"{p.ppl:.2f}" for p in (*points.elastic, *points.baseline, *points.paper_gates["proxy"])),
        *(f"k_active {p.k_active}" for p in points.elastic),
        "top-1",
        "proxy",
        "3 : 2",  # all points of this example are distinct and stable
    ):
        assert expected in page.text, expected


@pytest.mark.usefixtures("no_pictures")
def test_page_says_what_was_not_measured() -> None:
    text = Page(render_html(operating_points(checked=False), RECIPE, "A model")).text
    assert "It was not measured here" in text
    assert "operating points that are distinct and stable" not in text
    assert text.count("?") >= 6  # the three budgets and two baselines, and once in the explanation
    assert "nats per token lost at half the budget" in text
    without_half = Page(render_html(operating_points((1, 8)), RECIPE, "A model")).text
    assert "half the budget" not in without_half


@pytest.mark.usefixtures("no_pictures")
def test_a_later_report_replaces_an_earlier_one_and_a_failed_one_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(tmp_path, operating_points(), RECIPE, "First")
    write_report(tmp_path, operating_points((2, 8)), RECIPE, "Second")
    assert "Second" in (tmp_path / "index.html").read_text(encoding="utf-8")

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("moe_prism.checkpoint.atomic.sync", full_disk)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(PrismError, match="no space left"):
        write_report(tmp_path, operating_points(), RECIPE, "Third")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before  # nothing half-written, nothing left over


@pytest.mark.usefixtures("no_pictures")
def test_report_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(PrismError, match="cannot be written"):
        write_report(tmp_path / "file", operating_points(), RECIPE, "A model")


def test_pictures_are_repeatable_and_follow_the_points() -> None:
    points = operating_points()
    svg = frontier_svg(points)
    assert frontier_svg(points) == svg
    assert frontier_svg(operating_points((1, 2, 8))) != svg
    narrow = ElementTree.fromstring(frontier_svg(points, "dark", stacked=True))
    assert float(narrow.attrib["height"][:-2]) > float(narrow.attrib["width"][:-2])
    # markers are the placed, filled symbols; every point has one in each of the two panels
    drawn = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}use")
    placed = [use for use in drawn if use.get("style", "").startswith("fill")]
    points_in_all = len(points.elastic) + len(points.baseline) + len(points.paper_gates["proxy"])
    legend = 3
    assert len(placed) == 2 * points_in_all + legend


def test_table_lists_all_points_and_counts() -> None:
    points = operating_points()
    console = Console(width=80)
    with console.capture() as captured:
        console.print(frontier_table(points))
    text = captured.get()
    for p in points.elastic:
        assert re.search(rf"{p.k_active}/{points.full_budget} .*{p.nll:.4f}.*{p.ppl:.2f}", text)
    for b in points.baseline:
        assert re.search(rf"top-{b.k} .*{b.nll:.4f}", text)
    assert "3 elastic points and 2 of the original" in " ".join(text.split())
    unchecked = operating_points(checked=False)
    with console.capture() as captured:
        console.print(frontier_table(unchecked))
    assert "Stability was not measured" in captured.get()
    assert "D?" in captured.get()


def test_full_loss_comes_from_either_series() -> None:
    points = operating_points((1, 4))  # full budget not measured; the baseline's last point is the full model
    assert full_loss(points) == points.baseline[-1].nll
    assert full_loss(points.model_copy(update={"baseline": []})) is None


def test_light_parts_import_nothing_heavy() -> None:
    code = (
        "import sys, moe_prism.evaluation.points, moe_prism.evaluation.report, moe_prism.evaluation.table, "
        "moe_prism.evaluation.text, moe_prism.evaluation.environment, moe_prism.evaluation.lm_eval_plugin\n"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'lm_eval'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

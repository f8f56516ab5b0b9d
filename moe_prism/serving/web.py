"""The web page: three files of the package put together once, so that the browser asks for nothing else."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).with_name("page")


def page_html() -> str:
    """One HTML document with its style and script inside."""
    page = (_FOLDER / "index.html").read_text(encoding="utf-8")
    for mark, name in (("/* style.css */", "style.css"), ("/* script.js */", "script.js")):
        page = page.replace(mark, (_FOLDER / name).read_text(encoding="utf-8"))
    return page

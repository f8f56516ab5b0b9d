"""Results of policies side by side as tables for the terminal. Knows only the record of ``results``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..scheduling.policies.ablation import ABLATION


def load_tables(record: Mapping[str, Any]) -> list[Table]:
    """One table per load, a row per policy; percentiles of latencies in milliseconds."""
    return [_table(_title(name, load, record), load["policies"].items()) for name, load in record["loads"].items()]


def ablation_table(record: Mapping[str, Any]) -> Table | None:
    """Neither half, each alone and both, at the highest load that has all four; None where none has."""
    complete = [name for name, load in record["loads"].items() if set(ABLATION.values()) <= set(load["policies"])]
    if not complete:
        return None
    name = max(complete, key=lambda each: record["loads"][each]["share"])
    load = record["loads"][name]
    rows = [(label, load["policies"][policy]) for label, policy in ABLATION.items()]
    return _table(f"Ablation, {_title(name, load, record)}", rows)


def _title(name: str, load: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    kind = "simulated" if record["simulated"] else "measured"
    rate = "" if load["rate_rps"] is None else f", {load['rate_rps']:.2f} a second"
    return f"{name}: {load['requests']:,} requests{rate}, {load['share']:g} x full budget's capacity ({kind})"


def _table(title: str, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    table.add_column("policy", no_wrap=True)  # 80 columns hold the table; the JSON has the rest
    for heading in ("req/s", "good/s", "TTFT\np50", "\np99", "TPOT\np99", "e2e\np50", "mean\nk", "\nKL"):
        table.add_column(heading, justify="right", no_wrap=True)
    broken = 0
    for name, row in rows:
        rates = [_number(row[key], 2) for key in ("throughput_rps", "goodput_rps")]
        shown = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("tpot_ms", "p99"), ("e2e_ms", "p50"))
        latencies = [_number(row[key][percentile], 0) for key, percentile in shown]
        table.add_row(name, *rates, *latencies, _number(row["mean_k"], 1), _number(row.get("mean_kl"), 4))
        broken += row["floor_violations"]
    table.caption = f"requests below their floor: {broken}"
    return table


def _number(value: float | None, digits: int) -> str:
    return "" if value is None or math.isnan(value) else f"{value:,.{digits}f}"

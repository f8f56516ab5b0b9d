"""What the offloading bench calls its engines, and its runs as a table. Knows nothing of processes."""

from __future__ import annotations

from typing import Any

OURS, LOW, WITHOUT, LRU, WHOLE, ACCELERATE, LLAMA = (
    "moe-prism",
    "moe-prism, 4 bits",
    "moe-prism without read-ahead",
    "lru",
    "whole-expert LRU",
    "accelerate",
    "llama.cpp, mmap",
)
# Of those that have no blocks of ours: budgets are whole experts, hits and stalls are not known.
FOREIGN = (ACCELERATE, LLAMA)
FIELDS = (
    "engine",
    "memory_gb",
    "routing",
    "k_active",
    "ms_per_token",
    "hit_rate",
    "stall_ms",
    "read_gbs",
    "raw_read_gbs",
    "peak_rss_gb",
)


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown, one row a run, with the time over that of whole-expert LRU under the same conditions."""
    lines = [
        "| routing | memory GB | budget of 32 | engine | ms a token | of whole-expert LRU | hit rate | stall ms | "
        "GB/s stalled (raw) | MB a token | read ahead right | peak RSS GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    base = {(r["routing"], r["memory_gb"], r["k_active"]): r["ms_per_token"] for r in runs if r["engine"] == WHOLE}
    for run in runs:
        whole = base.get((run["routing"], run["memory_gb"], run["k_active"]))
        ours = run["engine"] not in FOREIGN
        cells = [
            run["routing"],
            f"{run['memory_gb']:g}",
            budget_of(run),
            run["engine"],
            f"{run['ms_per_token']:,.0f}",
            f"{run['ms_per_token'] / whole:.2f}" if whole else "",
            f"{run['hit_rate']:.3f}" if ours else "",
            f"{run['stall_ms']:,.0f}" if ours else "",
            f"{run['read_gbs']:.2f} ({run['raw_read_gbs']:.2f})" if ours else "",
            f"{run['disk_mb_per_token']:,.0f}",
            f"{run['ahead_precision']:.2f}" if ours and run["ahead_per_token"] else "",
            f"{run['peak_rss_gb']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def budget_of(run: dict[str, Any]) -> str:
    """The budget of a row in words."""
    if run.get("mean_budget"):
        low = f", {run['mean_low']:.1f} of it at 4 bits" if run.get("mean_low") else ""
        return f"{run['mean_budget']:.1f}{low}"
    return f"{run['k_active']}, {run['k_stored']} stored" if run.get("k_stored") else str(run["k_active"])

"""From the steps of all rounds to one line per point, to the check of the logits, and to the printed table.

Knows nothing of processes and files.
"""

from __future__ import annotations

from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

LEAST_COSINE = 0.99


class Agreement(NamedTuple):
    """How far an engine's logits agree with those of the reference."""

    cosine: float
    same_argmax: bool
    ok: bool


def agreement(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> Agreement:
    """Cosine of the centred vectors: a constant says nothing, and some engines give log-probabilities."""
    a, b = (v.astype(np.float64) - v.astype(np.float64).mean() for v in (logits, reference))
    cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    return Agreement(cosine, bool(a.argmax() == b.argmax()), cosine > LEAST_COSINE)


def summarise(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per engine and point, in the order they were first seen.

    Args:
        rounds: {"engine", "points": [{"tokens", "k_active", "ms": [of every step]}]}, one per process.

    Returns:
        ``ms``: median over rounds of each round's median step; ``ms_spread``: lowest and highest of those.
    """
    medians: dict[tuple[str, int, int], list[float]] = {}
    for result in rounds:
        for point in result["points"]:
            key = (result["engine"], point["tokens"], point["k_active"])
            medians.setdefault(key, []).append(median(point["ms"]))
    return [
        {
            "engine": engine,
            "tokens": tokens,
            "k_active": k_active,
            "ms": median(ms),
            "ms_spread": [min(ms), max(ms)],
            "ms_rounds": ms,
        }
        for (engine, tokens, k_active), ms in medians.items()
    ]


def table(runs: list[dict[str, Any]], ours: str) -> str:
    """Markdown: time of every point, and how many times faster it is than each other engine's at as many tokens."""
    peers = list(dict.fromkeys(run["engine"] for run in runs if run["engine"] != ours))
    times = {(run["engine"], run["tokens"]): run["ms"] for run in runs if run["engine"] != ours}
    heads = ["tokens", "engine", "k_active", "ms per step (rounds)", *(f"speed / {peer}" for peer in peers)]
    lines = ["| " + " | ".join(heads) + " |", "|---:|---|---:|---:|" + "---:|" * len(peers)]
    for run in sorted(runs, key=lambda run: run["tokens"]):
        low, high = run["ms_spread"]
        ratios = [
            f"{times[peer, run['tokens']] / run['ms']:.2f}" if (peer, run["tokens"]) in times else "" for peer in peers
        ]
        cells = [
            str(run["tokens"]),
            run["engine"],
            str(run["k_active"]),
            f"{run['ms']:.1f} ({low:.1f} to {high:.1f})",
            *ratios,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

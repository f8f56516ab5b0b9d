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
    """One row per engine, wait policy and point, in the order they were first seen.

    Args:
        rounds: {"engine", "wait_policy", "points": [{"tokens", "k_active", "ms": [of every step]}]}, one per process.

    Returns:
        ``ms``: median over rounds of each round's median step; ``ms_spread``: lowest and highest of those.
    """
    medians: dict[tuple[str, int, int, str], list[float]] = {}
    for result in rounds:
        for point in result["points"]:
            key = (result["engine"], point["tokens"], point["k_active"], result["wait_policy"])
            medians.setdefault(key, []).append(median(point["ms"]))
    return [
        {
            "engine": engine,
            "tokens": tokens,
            "k_active": k_active,
            "wait_policy": policy,
            "ms": median(ms),
            "ms_spread": [min(ms), max(ms)],
            "ms_rounds": ms,
        }
        for (engine, tokens, k_active, policy), ms in medians.items()
    ]


def best(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every engine and point the row of its faster wait policy: no engine may lose by a setting."""
    fastest: dict[tuple[str, int, int], dict[str, Any]] = {}
    for run in runs:
        key = (run["engine"], run["tokens"], run["k_active"])
        if key not in fastest or run["ms"] < fastest[key]["ms"]:
            fastest[key] = run
    return list(fastest.values())


def table(runs: list[dict[str, Any]], ours: str) -> str:
    """Markdown, of one row per point: its time, and how many times faster it is than each peer at as many tokens."""
    peers = list(dict.fromkeys(run["engine"] for run in runs if run["engine"] != ours))
    times = {(run["engine"], run["tokens"]): run["ms"] for run in runs if run["engine"] != ours}
    heads = [
        "tokens",
        "engine",
        "k_active",
        "wait policy",
        "ms per step (rounds)",
        *(f"speed / {peer}" for peer in peers),
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---:|---|---:|---|---:|" + "---:|" * len(peers)]
    for run in sorted(runs, key=lambda run: run["tokens"]):
        low, high = run["ms_spread"]
        ratios = [
            f"{times[peer, run['tokens']] / run['ms']:.2f}" if (peer, run["tokens"]) in times else "" for peer in peers
        ]
        cells = [
            str(run["tokens"]),
            run["engine"],
            str(run["k_active"]),
            run["wait_policy"],
            f"{run['ms']:.1f} ({low:.1f} to {high:.1f})",
            *ratios,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

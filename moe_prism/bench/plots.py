"""Results of policies side by side as pictures, in the shape of figures 7, 10, 11 and 12 of arXiv 2510.19366.

Knows only the record of ``results``, and for the last picture a cost model. Deterministic: equal input, equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.atomic import replace_file
from ..errors import PrismError
from ..scheduling.cost_model import CostModel
from ..scheduling.policies.ablation import ABLATION

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart with any colour vision, and a hatch each; ours last and strongest
COLOURS = ("#999999", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2")
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "")
OURS = "continuous"
_FIGURES: tuple[tuple[str, Callable[[Mapping[str, Any]], float | None], bool], ...] = (
    ("throughput, requests/s", lambda row: row["throughput_rps"], False),
    ("goodput, requests/s", lambda row: row["goodput_rps"], False),
    ("TTFT p99, ms", lambda row: row["ttft_ms"]["p99"], True),
    ("TPOT p99, ms", lambda row: row["tpot_ms"]["p99"], False),
    ("end to end p50, ms", lambda row: row["e2e_ms"]["p50"], True),
    ("mean KL, nats", lambda row: row.get("mean_kl"), False),
)


def write_plots(folder: Path, record: Mapping[str, Any], cost: CostModel | None = None) -> list[Path]:
    """Write policies.png and curves.png, ablation.png if its policies ran, cost_model.png if its steps are known.

    Raises:
        PrismError: the folder cannot be written to.
    """
    pictures = {"policies.png": policies_png(record), "curves.png": curves_png(record)}
    if any(set(ABLATION.values()) <= set(load["policies"]) for load in record["loads"].values()):
        pictures["ablation.png"] = ablation_png(record)
    if cost is not None and cost.measured:
        pictures["cost_model.png"] = cost_png(cost)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in pictures.items():
            replace_file(folder / name, content)
    except OSError as error:
        raise PrismError(f"plots cannot be written to {folder} ({error}); name another place") from error
    return [folder / name for name in pictures]


def policies_png(record: Mapping[str, Any]) -> bytes:
    """Throughput, goodput, TTFT, TPOT, end-to-end latency and KL by load, a bar per policy."""
    names = _ordered({name for load in record["loads"].values() for name in load["policies"]})
    series = {name: {load: row["policies"].get(name) for load, row in record["loads"].items()} for name in names}
    return _bars(series, list(record["loads"]), _kind(record))


def ablation_png(record: Mapping[str, Any]) -> bytes:
    """The elastic model and our scheduling apart and together, by load."""
    loads = [name for name, load in record["loads"].items() if set(ABLATION.values()) <= set(load["policies"])]
    series = {
        label: {name: record["loads"][name]["policies"][policy] for name in loads} for label, policy in ABLATION.items()
    }
    return _bars(series, loads, _kind(record))


def curves_png(record: Mapping[str, Any]) -> bytes:
    """Throughput and latency of a decode step over the batch, a line per budget."""
    figure = _figure((9.0, 3.6))
    left, right = figure.subplots(1, 2)
    budgets = sorted({point["k_active"] for point in record["curves"]})
    for i, k in enumerate(budgets):
        points = [point for point in record["curves"] if point["k_active"] == k]
        batch = [point["batch"] for point in points]
        style = {"color": COLOURS[-1 - i], "marker": "os^vDP"[i], "markersize": 4.5, "label": f"k = {k}"}
        left.plot(batch, [point["tokens_per_s"] for point in points], **style)
        right.plot(batch, [point["step_ms"] for point in points], **style)
    for axes, title in ((left, "tokens/s of decoding"), (right, "step, ms")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("batch")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _dress(axes, title)
    left.legend(frameon=False, fontsize=9)
    figure.suptitle("cost model C(batch, k)", x=0.01, ha="left", fontsize=10)
    return _png(figure)


def cost_png(cost: CostModel) -> bytes:
    """Predicted against measured step times, held-out steps apart."""
    figure = _figure((4.8, 4.4))
    axes = figure.subplots()
    for held_out, label, colour in ((False, "fitted", COLOURS[0]), (True, "held out", COLOURS[-1])):
        chosen = [step for step in cost.measured if step.held_out is held_out]
        measured, predicted = [s.seconds * 1e3 for s in chosen], [cost.seconds(s.load) * 1e3 for s in chosen]
        axes.scatter(measured, predicted, s=14, color=colour, label=label)
    ends = [f(s.seconds for s in cost.measured) * 1e3 for f in (min, max)]
    axes.plot(ends, ends, color="#1f2328", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("measured step, ms")
    axes.set_ylabel("predicted, ms")
    errors = "" if cost.median_error is None else f": error {cost.median_error:.1%} median, {cost.p95_error:.1%} p95"
    _dress(axes, f"cost model, held-out steps{errors}")
    axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def _bars(series: Mapping[str, Mapping[str, Any]], loads: Sequence[str], kind: str) -> bytes:
    figure = _figure((11.0, 5.6))
    width = 0.8 / max(1, len(series))
    for axes, (title, value, log) in zip(figure.subplots(2, 3).flat, _FIGURES, strict=True):
        for i, (name, rows) in enumerate(series.items()):
            found = [value(rows[load]) if rows.get(load) is not None else None for load in loads]
            heights = [float("nan") if height is None else height for height in found]
            place = [j - 0.4 + (i + 0.5) * width for j in range(len(loads))]
            colour = COLOURS[i - len(series)]
            axes.bar(place, heights, width, label=name, color=colour, hatch=HATCHES[i - len(series)], edgecolor="white")
        axes.set_xticks(range(len(loads)), loads)
        if log and any(bar.get_height() > 0 for bar in axes.patches):
            axes.set_yscale("log")
        _dress(axes, title)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(series)), frameon=False, fontsize=9)
    figure.suptitle(kind, x=0.01, ha="left", fontsize=10)
    return _png(figure)


def _ordered(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: (name == OURS, name))


def _kind(record: Mapping[str, Any]) -> str:
    return "simulated from a cost model" if record["simulated"] else "measured"


def _figure(size: tuple[float, float]) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")  # without pyplot: no global state, no display


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(axis="y", color="#d8dee4", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()

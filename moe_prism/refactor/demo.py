"""The demo: refactor a small model, measure it beside the paper's gates and the baseline, write both.

Everything in it is the public way; it only chooses what to compare. Knows nothing of the command line.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..checkpoint.read import open_checkpoint
from ..checkpoint.schema import OperatingPoints
from ..elastic import attach, full_budget, load_elastic
from ..errors import CheckpointError, PrismError
from ..evaluation.report import write_report
from ..evaluation.sampling import sampled_text
from ..evaluation.save import save_points
from ..evaluation.sweep import sweep
from .pipeline import Progress, load_stock, make_elastic, refactor_model
from .recipe import Recipe

_PARTITION: dict[str, Any] = {
    "solver": "annealing",
    "solver_options": {},
    "impact": "activation",
    "neurons": "all",
    "shadow_bits": 0,
    "compensation_budgets": 0,
    "recalibration": "mean",
    "token_budgets": "equal",
    "layer_budgets": "uniform",
}
PAPER_N = 4
# The paper's own partition and gates: N = 4 where that can be compared, annealing on plain activations, no routing
# weight in the proxy's score.
PAPER: dict[str, dict[str, Any]] = {
    "paper: proxy": _PARTITION | {"gate": "proxy", "gate_options": {"weighted": False}},
    "paper: linear": _PARTITION | {"gate": "linear", "gate_options": {}},
}


class DemoResult(NamedTuple):
    """What the demo leaves in memory: the elastic model, its tokenizer and what was measured."""

    model: PreTrainedModel
    tokenizer: Any
    points: OperatingPoints


def run_demo(
    source: Path,
    out: Path,
    recipe: Recipe,
    *,
    calibration: Path | None,
    text: Path | None,
    second_text: Path | None,
    tokens: int,
    dtype: str | torch.dtype,
    progress: Progress,
) -> DemoResult:
    """Write ``out/elastic`` and ``out/report``.

    Args:
        source: a stock model directory.
        out: an earlier demo in it is replaced.
        recipe: how to refactor.
        calibration: calibration text; None: the model writes it.
        text: held-out text; None: the model writes it.
        second_text: another one, for stability; None: the model writes it with another seed.
        tokens: of each held-out text.
        dtype: of the weights while computing.
        progress: see ``Progress``.

    Raises:
        PrismError: bad input, or ``out/elastic`` holds something that is not a checkpoint of ours.
    """
    target = out / "elastic"
    _clear(target)
    words = str(calibration) if calibration else None
    recipe = make_elastic(source, target, recipe, text=words, compute_dtype=dtype, progress=progress).recipe
    model = load_elastic(target, dtype=dtype)

    def variant(label: str, changes: dict[str, Any]) -> PreTrainedModel:
        stock, tokenizer = load_stock(str(source), dtype)
        changed = Recipe.of(recipe.model_dump() | changes)
        done, work = refactor_model(
            stock, tokenizer, changed, out / "variant", words, lambda _, n, total: progress(label, n, total)
        )
        work.remove()
        attach(stock, done.elastic, done.tensors)
        return stock

    second = variant("another seed", {"seed": recipe.seed + 1})
    n = PAPER_N if recipe.num_sub_experts % PAPER_N == 0 else recipe.num_sub_experts
    beside = {name: variant(name, {"num_sub_experts": n} | changes) for name, changes in PAPER.items()}
    original, tokenizer = load_stock(str(source), dtype)
    with ExitStack() as stack:

        def or_sampled(given: Path | None, seed: int) -> Path:
            tell = partial(progress, "sampling held-out text")
            return given or stack.enter_context(sampled_text(original, tokenizer, tokens, seed, tell))

        points = sweep(
            model,
            tokenizer,
            or_sampled(text, 101),
            seed=recipe.seed,
            budgets=recipe.budgets(full_budget(model)),
            tokens=tokens,
            second_text=or_sampled(second_text, 102),
            second_model=second,
            second_seed=recipe.seed + 1,
            beside=beside,
            reference=original,
            progress=progress,
        ).points
    checkpoint = open_checkpoint(target)
    save_points(checkpoint, points)
    write_report(out / "report", points, checkpoint.recipe(), f"{source.name}, elastic")
    return DemoResult(model, tokenizer, points)


def _clear(target: Path) -> None:
    if not target.exists():
        return
    try:
        open_checkpoint(target, verify=False)
    except CheckpointError:
        raise PrismError(
            f"{target} exists and is not an elastic checkpoint; remove it or name another folder with --out"
        ) from None
    shutil.rmtree(target)

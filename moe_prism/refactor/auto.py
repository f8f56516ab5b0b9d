"""Choose the methods of a recipe by trying them: what is kept lowers KL to the full model at equal cost.

A short list of methods is tried in order, each on top of the best so far, and kept where it helps. Judged is on
calibration text that nothing was fitted on, at the largest budgets within a few shares of the routed work, scoring
included. What a try settles is reused by the next ones as far as it does not depend on what they change, and the best
one's is the refactoring. Knows the names of methods, not how they work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from ..checkpoint.schema import Choice, Try
from ..elastic import attach, budget
from ..elastic.cost import budget_within
from ..errors import PrismError
from ..evaluation.measure import Run, measure
from ..experts import find_expert_layers
from .calibration import load_calibration
from .recipe import Recipe
from .workspace import STAGES, Workspace, folder_of, model_identity

SHARES = (0.75, 0.5, 0.25)
HELD_OUT = 2048
# A method must lower the geometric mean of KL over the shares by so much, or it is not worth its place.
LEAST_GAIN = 0.02


class Method(NamedTuple):
    """A name and the fields of a recipe that it sets."""

    name: str
    changes: dict[str, Any]


# In the order of trying: a new method is a line here.
METHODS: tuple[Method, ...] = (
    Method(
        "static order, N = 8",
        {
            "num_sub_experts": 8, "solver": "importance", "solver_options": {}, "gate": "static", "gate_options": {},
            "neurons": "all", "fold": False, "compensation_budgets": 0, "token_budgets": "equal",
            "layer_budgets": "uniform",
        },
    ),
    Method("weighted proxy gate, balanced partition", {"solver": "balanced", "gate": "proxy"}),
    Method(
        "neurons by their gates",
        {"neurons": "gate-first", "solver": "importance", "gate": "static", "gate_options": {}},
    ),
    Method("compensation", {"compensation_budgets": 8}),
    Method("budgets shared by tokens", {"token_budgets": "shared"}),
    Method("layer budgets", {"layer_budgets": "measured"}),
    Method("N = 16", {"num_sub_experts": 16}),
    Method("N = 4", {"num_sub_experts": 4}),
)  # fmt: skip
# The first stage of a refactoring (``workspace.STAGES``) that a field changes; any other field changes all of them.
_STAGE_OF = {"compensation_budgets": "compensation", "token_budgets": "sharing", "layer_budgets": "layer_budgets"}
KEPT = "kept"

Attempt = Callable[[Recipe, Path, Path | None, str], PreTrainedModel]
"""``attempt(recipe, out, start, before)``: an elastic model in memory. Unfinished work goes beside ``out``; what the
working folder ``start`` holds of stages before ``before`` is taken over."""


class Chosen(NamedTuple):
    """The recipe with its methods filled in, the record of the search, and the working folder of the best try."""

    recipe: Recipe
    choice: Choice
    folder: Path


class Searched(NamedTuple):
    """``Chosen``, and what keeps the tries until the checkpoint is written."""

    recipe: Recipe
    choice: Choice
    folder: Path
    work: Workspace


def search_methods(
    recipe: Recipe,
    out: Path,
    text: str | None,
    load: Callable[[], tuple[PreTrainedModel, Any]],
    refactor: Callable[..., tuple[Any, Workspace]],
    progress: Callable[[str, int, int], None] | None = None,
) -> Searched:
    """Choose the methods of a refactoring; finished tries are kept in ``OUT.auto.partial/``.

    Args:
        recipe: with ``methods: auto``.
        out: where the checkpoint will go.
        text: calibration text; a part of it is held out.
        load: gives the stock model and its tokenizer.
        refactor: ``refactor_model``.
        progress: called with (stage, steps done, in all); stages "sample" and "methods".
    """
    tell = progress or (lambda stage, done, total: None)
    model, tokenizer = load()
    identity = model_identity(model, find_expert_layers(model))
    key = {"model": identity, "recipe": recipe.model_dump(mode="json"), "text": text}
    search = Workspace(out.with_name(f"{out.name}.auto"), key)
    fitted = Workspace(search.path / "fitted", key)
    held_out = search.windows()
    if held_out is None:
        report = partial(tell, "sample")
        tokens, context = recipe.calibration_tokens, recipe.context
        windows, name = load_calibration(text, tokenizer, model, tokens, context, recipe.seed, report)
        to_fit, to_judge = split_held_out(windows)
        fitted.keep_windows(to_fit, name)
        search.keep_windows(to_judge, name)
        held_out = to_judge, name

    def attempt(candidate: Recipe, where: Path, start: Path | None, before: str) -> PreTrainedModel:
        stock, _ = load()
        done, _ = refactor(stock, None, candidate, where, text, None, start or fitted.path, before)
        attach(stock, done.elastic, done.tensors)
        return stock

    return Searched(*choose_methods(recipe, *held_out, attempt, search, partial(tell, "methods")), search)


def split_held_out(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Calibration windows to fit on and to judge by: the last ``HELD_OUT`` tokens, a quarter at most."""
    if len(windows) < 2:
        raise PrismError("methods: auto needs two windows of calibration text or more; raise calibration_tokens")
    held = max(1, min(HELD_OUT // windows.shape[1], len(windows) // 4))
    return windows[:-held], windows[-held:]


def choose_methods(
    recipe: Recipe,
    held_out: Tensor,
    text: str,
    attempt: Attempt,
    work: Workspace,
    progress: Callable[[int, int], None] | None = None,
) -> Chosen:
    """Try ``METHODS``; a search that was interrupted goes on where it stopped.

    Args:
        recipe: its fields that no method sets hold for all tries.
        held_out: int64 ``[n, context]``, tokens to judge by.
        text: their name, for the record.
        attempt: refactors by a recipe and attaches.
        work: keeps the finished tries.
        progress: called with (methods tried, in all).

    Raises:
        PrismError: not even the first method is possible.
    """
    tries = [Try.model_validate(each) for each in work.record("tries") or []]
    best: dict[str, Any] = {}
    score, folder = math.inf, None
    for number, method in enumerate(METHODS):
        out = work.path / f"try-{number}"
        if number == len(tries):
            spent = sum(each.seconds for each in tries)
            if best and all(best.get(name) == value for name, value in method.changes.items()):
                found = _not_tried(method, "in use already")
            elif best and spent >= recipe.time_limit:
                found = _not_tried(method, f"not tried: {spent:.0f} s were spent")
            else:
                candidate = Recipe.of(recipe.model_dump() | {"methods": "given", "points": []} | best | method.changes)
                found = _try(method, partial(attempt, candidate, out, folder, _first_stage(method)), held_out, score)
            tries.append(found)
            work.keep_record("tries", [each.model_dump() for each in tries])
        if tries[number].outcome == KEPT:
            best, score, folder = best | method.changes, _score(tries[number].kl), folder_of(out)
        if progress:
            progress(number + 1, len(METHODS))
    if folder is None:
        raise PrismError(f"none of the known methods is possible here: {tries[0].name}: {tries[0].outcome}")
    choice = Choice(text=text, tokens=held_out.numel(), shares=list(SHARES), time_limit=recipe.time_limit, tries=tries)
    return Chosen(Recipe.of(recipe.model_dump() | {"methods": "given"} | best), choice, folder)


def _try(method: Method, attempt: Callable[[], PreTrainedModel], held_out: Tensor, to_beat: float) -> Try:
    begin = time.monotonic()
    try:
        model = attempt()
        budgets = {share: budget_within(model, share) for share in SHARES}
        if None in budgets.values():
            raise PrismError(f"no budget costs {min(s for s, k in budgets.items() if k is None):.0%} or less")
        runs = [Run(f"{share}", partial(budget, model, k)) for share, k in budgets.items()]  # type: ignore[arg-type]
        measured = measure(model, held_out, runs)
    except PrismError as error:
        return _not_tried(method, f"impossible: {error}")
    kl = [measured[run.name].kl for run in runs]
    better = _score(kl) < to_beat - LEAST_GAIN
    seconds = time.monotonic() - begin
    return Try(
        name=method.name, changes=method.changes, kl=kl, seconds=seconds, outcome=KEPT if better else "no better"
    )


def _not_tried(method: Method, why: str) -> Try:
    return Try(name=method.name, changes=method.changes, outcome=why)


def _score(kl: Sequence[float]) -> float:
    """The logarithm of the geometric mean."""
    return sum(math.log(max(each, 1e-9)) for each in kl) / len(kl)


def _first_stage(method: Method) -> str:
    stages = {_STAGE_OF.get(name, "layers") for name in method.changes}
    return next(stage for stage in STAGES if stage in stages)

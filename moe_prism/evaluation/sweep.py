"""Measures every budget of an elastic model, the original with fewer experts beside it, and what stability needs.

Knows how budgets are switched (:mod:`moe_prism.elastic`); nothing of files other than texts, and nothing of reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_prism import elastic
from moe_prism.checkpoint.schema import OperatingPoints
from moe_prism.errors import PrismError, UnsupportedModelError
from moe_prism.experts import find_expert_layers

from .environment import machine, versions
from .kept import Kept
from .measure import Run, max_logit_difference, measure
from .phases import measure_phases
from .points import Cost, Further, Measured, Provenance, RunResult, build_operating_points
from .text import read_text, text_name, tokenize, windows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

StageProgress = Callable[[str, int, int], None]
"""Called with (stage, forward passes done, forward passes in all of the stage)."""

# Parity with the original needs no long text: every position of these windows is compared.
_PARITY_WINDOWS = 8


@dataclass(frozen=True)
class SweepResult:
    """What a sweep measured.

    Attributes:
        points: The content of operating_points.json.
        elastic: Per-token results by budget, on the first text.
        baseline: Per-token results of the original model by number of routed experts, on the first text.
        beside: The same by budget for every model measured beside.
        further: Second text and second seed, as far as they were asked for.
    """

    points: OperatingPoints
    elastic: Measured
    baseline: dict[int, RunResult]
    beside: dict[str, Measured]
    further: Further


def sweep(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str | Path,
    *,
    seed: int,
    budgets: Sequence[int] | None = None,
    tokens: int = 65_536,
    context: int = 256,
    batch_size: int = 8,
    second_text: str | Path | None = None,
    second_model: PreTrainedModel | None = None,
    second_seed: int | None = None,
    beside: Mapping[str, PreTrainedModel] | None = None,
    reference: PreTrainedModel | None = None,
    phases: Sequence[int] | None = None,
    progress: StageProgress | None = None,
    kept: Kept | None = None,
) -> SweepResult:
    """Measures budgets on a text; the full model runs once for all of them.

    Args:
        model: The elastic model, as :func:`moe_prism.elastic.load_elastic` gives it. Its budget is put back.
        tokenizer: Its tokenizer.
        text: File or directory of held-out text, see :func:`moe_prism.evaluation.text.read_text`.
        seed: Calibration seed of ``model``, for the record.
        budgets: Budgets to measure, each in 1..full; all by default.
        tokens: Tokens of each text to read at most. The number of predicted ones is a multiple of ``context``.
        context: Window length in tokens.
        batch_size: Windows per forward pass.
        second_text: Another held-out text, for ``stable``.
        second_model: The same original refactored with another calibration seed, for ``stable``.
        second_seed: Its seed; goes with ``second_model``.
        beside: Further elastic models of the same original by name, e.g. the paper's gates. One may have fewer
            sub-experts; its budgets are given in the model's.
        reference: The original model in the same dtype, for the largest logit difference at full budget.
        phases: Budgets to measure on prompts and continuations of the first text too, in all pairs.
        progress: Told after every forward pass.
        kept: Where finished batches of the texts are kept, for a sweep that is interrupted.

    Raises:
        PrismError: a budget out of range or repeated, an unusable text, or models that do not belong together; all
            before the first forward pass. Also logits that are not finite.
    """
    full = elastic.full_budget(model)
    top_k = find_expert_layers(model)[0].top_k
    chosen = _check_budgets(budgets, full)
    paired = None if phases is None else _check_budgets(phases, full)
    others = dict(beside or {})
    if (second_model is None) != (second_seed is None):
        raise PrismError("second_model and second_seed go together: give both or neither")
    if second_model is not None and (second_full := elastic.full_budget(second_model)) != full:
        raise PrismError(
            f"second_model has full budget {second_full}, the model has {full}: refactor both with the same N"
        )
    for name, other in others.items():
        if full % elastic.full_budget(other):
            raise PrismError(
                f"{name} has full budget {elastic.full_budget(other)}, which does not divide the model's {full}: "
                "refactor it with an N that divides the model's"
            )
    # In the model's units; a coarser one has a point wherever its own budgets lie.
    theirs = {name: [k for k in chosen if not k * elastic.full_budget(other) % full] for name, other in others.items()}
    first = _windows_of(text, tokenizer, tokens, context)
    second = _windows_of(second_text, tokenizer, tokens, context) if second_text is not None else None

    levels = _baseline_levels(model, top_k)
    runs = [*_elastic_runs("elastic", model, chosen, full), *_baseline_runs(model, levels, top_k)]
    for name, other in others.items():
        runs += _elastic_runs(f"beside {name}", other, theirs[name], full)
    if second_model is not None:
        runs += _elastic_runs("second seed", second_model, chosen, full)

    def measured(stage: str, on: torch.Tensor, what: list[Run]) -> dict[str, RunResult]:
        report = partial(progress, stage) if progress is not None else None
        return measure(model, on, what, batch_size=batch_size, progress=report, kept=kept)

    difference = None
    with elastic.budget(model, full):
        if reference is not None:
            difference = max_logit_difference(model, reference, first[:_PARITY_WINDOWS], batch_size)
        results = measured(text_name(text), first, runs)
        again: dict[str, RunResult] = {}
        if second is not None and second_text is not None:
            both = [*_elastic_runs("elastic", model, chosen, full), *_baseline_runs(model, levels, top_k)]
            again = measured(text_name(second_text), second, both)

    both_phases = None
    if paired is not None:
        report = partial(progress, "prompt and continuation") if progress is not None else None
        both_phases = measure_phases(model, first, paired, text_name(text), batch_size, report)
    ours = _measured(model, "elastic", chosen, results, full)
    beside_measured = {
        name: _measured(other, f"beside {name}", theirs[name], results, full) for name, other in others.items()
    }
    baseline = _pick("baseline", levels, results)
    further = Further(
        text=text_name(second_text) if second_text is not None else None,
        seed=second_seed,
        elastic_text=_pick("elastic", chosen, again) if again else None,
        baseline_text=_pick("baseline", levels, again) if again else None,
        elastic_seed=_pick("second seed", chosen, results) if second_model is not None else None,
    )
    points = build_operating_points(
        full_budget=full,
        top_k=top_k,
        elastic=ours,
        baseline=baseline,
        provenance=Provenance(text_name(text), seed, versions(), machine(model)),
        further=further,
        beside=beside_measured,
        full_budget_max_logit_diff=difference,
    ).model_copy(update={"phases": both_phases})
    return SweepResult(points, ours, baseline, beside_measured, further)


def _check_budgets(budgets: Sequence[int] | None, full: int) -> list[int]:
    if budgets is None:
        return list(range(1, full + 1))
    if not budgets:
        raise PrismError(f"no budgets to measure; leave them out for all of 1..{full}")
    for budget in budgets:
        if not 1 <= budget <= full:
            raise PrismError(f"budget {budget} is not in 1..{full} (the full budget of this model)")
    if len(set(budgets)) != len(budgets):
        raise PrismError(f"budgets {list(budgets)} repeat; name each once")
    return sorted(budgets)


def _windows_of(text: str | Path, tokenizer: Any, tokens: int, context: int) -> torch.Tensor:
    try:
        return windows(tokenize(tokenizer, read_text(text, tokens * 16), tokens), context)
    except PrismError as error:
        raise PrismError(f"{text_name(text)}: {error}") from None


def _elastic_runs(series: str, model: PreTrainedModel, budgets: Sequence[int], full: int) -> list[Run]:
    """At full budget every elastic model is the original, so that run reuses the full model's outputs."""
    scale = full // elastic.full_budget(model)
    return [
        Run(f"{series} {k}", None if k == full else partial(elastic.budget, model, k // scale), model) for k in budgets
    ]


def _baseline_levels(model: PreTrainedModel, top_k: int) -> list[int]:
    """1..top_k without the levels that the family's router cannot take; found out before any work."""
    levels = []
    for k in range(1, top_k + 1):
        try:
            with elastic.routed_experts(model, k):
                levels.append(k)
        except UnsupportedModelError:
            continue
    return levels


def _baseline_runs(model: PreTrainedModel, levels: Sequence[int], top_k: int) -> list[Run]:
    return [Run(f"baseline {k}", None if k == top_k else partial(elastic.routed_experts, model, k)) for k in levels]


def _pick(series: str, levels: Sequence[int], results: Mapping[str, RunResult]) -> dict[int, RunResult]:
    return {level: results[f"{series} {level}"] for level in levels}


def _measured(
    model: PreTrainedModel, series: str, budgets: Sequence[int], results: Mapping[str, RunResult], full: int
) -> Measured:
    scale = full // elastic.full_budget(model)
    shares = {k: elastic.cost_shares(model, k // scale) for k in budgets}
    return Measured(_pick(series, budgets, results), {k: Cost(s.flops, s.bytes) for k, s in shares.items()})

"""From token losses to operating points: paired standard errors, which points are distinct, which are stable.

Pure NumPy and the checkpoint schema: knows nothing of models or of how the losses were measured.

Two words are defined here for the whole project:

*distinct*: Let points be sorted by budget and let d = loss(lower) - loss(higher) for two adjacent measured budgets,
token by token on the same text. The pair is *separated* if ``mean(d) > 2 * SE`` with the paired standard error
``SE = std(d, ddof=1) / sqrt(T)``: the higher budget has the lower mean loss by more than two paired standard errors.
A point is distinct if every pair it belongs to is separated: two pairs inside, one at the ends.

*stable*: A point is stable if in every pair it belongs to, the higher budget also has the lower mean loss
(``mean(d) > 0``; the sign alone) on a second held-out text and, on the first text, in a second model refactored
with another calibration seed. The original model has no calibration, so its points need the second text only.
Without these further measurements ``stable`` is None, unknown.

The count that is reported is of points that are both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moe_prism.checkpoint.schema import BaselinePoint, DistinctStable, OperatingPoint, OperatingPoints
from moe_prism.errors import PrismError

STANDARD_ERRORS = 2.0
"""How many paired standard errors separate two budgets."""


@dataclass(frozen=True)
class RunResult:
    """What one run over a text measured.

    Attributes:
        nll: float32 [T], loss of every predicted token in nats.
        kl: Mean KL(full model || run) in nats per token.
        top1_agreement: Share of tokens where the most likely next token is the full model's.
    """

    nll: NDArray[np.float32]
    kl: float
    top1_agreement: float

    @property
    def mean_nll(self) -> float:
        """Mean token loss in nats, summed in float64."""
        return float(self.nll.mean(dtype=np.float64))


Series = Mapping[int, RunResult]
"""Budget (or number of whole experts) -> its result; all on the same tokens."""


@dataclass(frozen=True)
class Cost:
    """Routed work of a budget, the gate included, as shares of the original model's routed work."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Measured:
    """One model's points: the results by budget and what each budget costs."""

    results: Series
    costs: Mapping[int, Cost]


@dataclass(frozen=True)
class Further:
    """The measurements that stability needs; a missing one leaves ``stable`` unknown.

    Attributes:
        text: Name of the second held-out text.
        seed: Calibration seed of the second model.
        elastic_text: The elastic model on the second text.
        baseline_text: The original model on the second text.
        elastic_seed: The second model on the first text.
    """

    text: str | None = None
    seed: int | None = None
    elastic_text: Series | None = None
    baseline_text: Series | None = None
    elastic_seed: Series | None = None


@dataclass(frozen=True)
class Provenance:
    """What the measurement ran on: fields of the same names in operating_points.json."""

    text: str
    seed: int
    versions: Mapping[str, str]
    machine: Mapping[str, str | int | float] = field(default_factory=dict)


def paired_difference(lower: NDArray[np.float32], higher: NDArray[np.float32]) -> tuple[float, float]:
    """Mean and standard error of ``lower - higher`` over tokens, in nats.

    Args:
        lower: [T] token losses at the lower budget.
        higher: [T] losses of the same tokens at the higher budget.

    Returns:
        The mean, positive where the higher budget is better, and ``std(ddof=1) / sqrt(T)``. One token has no
        standard error that could separate anything: it is infinite.

    Raises:
        PrismError: the two are not the same number of tokens.
    """
    if lower.shape != higher.shape:
        raise PrismError(f"losses of {lower.shape} and {higher.shape} tokens cannot be paired: measure the same text")
    difference = lower.astype(np.float64) - higher.astype(np.float64)
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
    return float(difference.mean()), error


def distinct(series: Series) -> dict[int, bool]:
    """Which budgets are distinct (see the module's definition). A single measured budget is distinct."""
    return _of_all_pairs(series, lambda mean, error: mean > STANDARD_ERRORS * error)


def stable(budgets: Sequence[int], further: Sequence[Series | None]) -> dict[int, bool | None]:
    """Which budgets keep their order in every further measurement (see the module's definition).

    Args:
        budgets: The budgets of the first measurement.
        further: Measurements of the same budgets; one that is ``None`` makes the answer unknown.

    Raises:
        PrismError: a further measurement covers other budgets, so the neighbours would differ.
    """
    if not further or any(series is None for series in further):
        return dict.fromkeys(budgets)
    ordered: list[dict[int, bool]] = []
    for series in further:
        if series is None or sorted(series) != sorted(budgets):
            raise PrismError(
                f"stability needs the same budgets in every measurement: {sorted(budgets)}, got {sorted(series or ())}"
            )
        ordered.append(_of_all_pairs(series, lambda mean, error: mean > 0))
    return {budget: all(held[budget] for held in ordered) for budget in budgets}


def count_points(points: Sequence[OperatingPoint] | Sequence[BaselinePoint]) -> int | None:
    """Points that are distinct and stable; ``None`` where stability of any is unknown."""
    if any(point.stable is None for point in points):
        return None
    return sum(point.distinct and point.stable is True for point in points)


def elastic_points(measured: Measured, full_budget: int, further: Sequence[Series | None] = ()) -> list[OperatingPoint]:
    """The schema's points of an elastic model, by ascending budget."""
    results = measured.results
    budgets = sorted(results)
    is_distinct, is_stable = distinct(results), stable(budgets, further)
    points = []
    for budget, above in zip(budgets, [*budgets[1:], None], strict=True):
        result = results[budget]
        error = None if above is None else paired_difference(result.nll, results[above].nll)[1]
        points.append(
            OperatingPoint(
                k_active=budget,
                share=budget / full_budget,
                nll=result.mean_nll,
                ppl=math.exp(result.mean_nll),
                kl=result.kl,
                top1_agreement=result.top1_agreement,
                flops_share=measured.costs[budget].flops,
                bytes_share=measured.costs[budget].bytes,
                stderr=error if error is not None and math.isfinite(error) else None,
                distinct=is_distinct[budget],
                stable=is_stable[budget],
            )
        )
    return points


def baseline_points(results: Series, top_k: int, further: Sequence[Series | None] = ()) -> list[BaselinePoint]:
    """The schema's points of the original model with k' of its ``top_k`` experts, by ascending k'."""
    is_distinct, is_stable = distinct(results), stable(sorted(results), further)
    return [
        BaselinePoint(
            k=k,
            share=k / top_k,
            nll=results[k].mean_nll,
            ppl=math.exp(results[k].mean_nll),
            kl=results[k].kl,
            top1_agreement=results[k].top1_agreement,
            distinct=is_distinct[k],
            stable=is_stable[k],
        )
        for k in sorted(results)
    ]


def build_operating_points(
    *,
    full_budget: int,
    top_k: int,
    elastic: Measured,
    baseline: Series,
    provenance: Provenance,
    further: Further | None = None,
    beside: Mapping[str, Measured] | None = None,
    full_budget_max_logit_diff: float | None = None,
) -> OperatingPoints:
    """Everything measured, as the content of operating_points.json.

    Args:
        full_budget: k * N.
        top_k: k, routed experts per token of the original model.
        elastic: The elastic model on the first text.
        baseline: The original model with k' = 1..k experts on the first text.
        provenance: Text, seed, versions and machine.
        further: Second text and second seed, for ``stable``.
        beside: Other elastic models by name, e.g. the paper's gates; ``stable`` stays unknown for them.
        full_budget_max_logit_diff: Against the original model; ``None`` where there was none to compare with.
    """
    further = further or Further()
    ours = elastic_points(elastic, full_budget, [further.elastic_text, further.elastic_seed])
    original = baseline_points(baseline, top_k, [further.baseline_text])
    return OperatingPoints(
        full_budget=full_budget,
        text=provenance.text,
        tokens=len(next(iter(elastic.results.values())).nll),
        seed=provenance.seed,
        second_text=further.text,
        second_seed=further.seed,
        versions=dict(provenance.versions),
        machine=dict(provenance.machine),
        elastic=ours,
        baseline=original,
        distinct_stable=DistinctStable(elastic=count_points(ours), baseline=count_points(original)),
        full_budget_max_logit_diff=full_budget_max_logit_diff,
        paper_gates={name: elastic_points(other, full_budget) for name, other in (beside or {}).items()},
    )


def _of_all_pairs(series: Series, holds: Callable[[float, float], bool]) -> dict[int, bool]:
    """Budget -> whether ``holds(mean, standard error)`` for all of its pairs of adjacent measured budgets."""
    budgets = sorted(series)
    answer = dict.fromkeys(budgets, True)
    for low, high in pairwise(budgets):
        if not holds(*paired_difference(series[low].nll, series[high].nll)):
            answer[low] = answer[high] = False
    return answer

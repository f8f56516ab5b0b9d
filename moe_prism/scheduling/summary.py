"""What a run of requests amounts to: throughput, goodput and latencies, whoever ran them.

*Goodput* counts the requests that met every objective they named. Time to first token is from arrival; time per output
token is the mean after the first one. Knows outcomes only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .outcomes import Outcome

PERCENTILES = (50, 90, 99)


def ttft(outcome: Outcome) -> float:
    """Seconds to the first token."""
    return outcome.first_token - outcome.job.request.arrival


def tpot(outcome: Outcome) -> float:
    """Seconds per token after the first; 0 where there is no second."""
    return (outcome.finished - outcome.first_token) / (outcome.tokens - 1) if outcome.tokens > 1 else 0.0


def met(outcome: Outcome) -> bool:
    """Whether the request ended and met its objectives."""
    wanted = outcome.job.request
    return (
        not math.isnan(outcome.finished)
        and (wanted.ttft_ms is None or ttft(outcome) * 1e3 <= wanted.ttft_ms)
        and (wanted.tpot_ms is None or tpot(outcome) * 1e3 <= wanted.tpot_ms)
    )


def summarise(outcomes: Sequence[Outcome], seconds: float, kl: Mapping[int, float] | None = None) -> dict[str, Any]:
    """Figures of a run; NaN (null in JSON: see ``bench``) where nothing ended.

    Args:
        outcomes: of all requests.
        seconds: from the first arrival to the last token.
        kl: budget -> KL to the full model in nats, measured; interpolated between.

    Returns:
        ``requests``, ``finished``, ``refused``, ``best_effort`` (objectives that no budget can meet),
        ``throughput_rps``, ``goodput_rps``, ``tokens_per_s``, ``ttft_ms``, ``tpot_ms`` and ``e2e_ms`` with p50, p90 and
        p99, ``floor_violations``, ``mean_k`` over generated tokens and ``mean_prompt_k`` over prompt tokens; where
        ``kl`` is given, also ``mean_kl`` and ``mean_prompt_kl``, the means of their budgets' KL.
    """
    ended = [o for o in outcomes if not math.isnan(o.finished)]
    record: dict[str, Any] = {
        "requests": len(outcomes),
        "finished": len(ended),
        "refused": sum(o.refused for o in outcomes),
        "best_effort": sum(o.job.request.best_effort for o in outcomes),
        "throughput_rps": len(ended) / seconds if seconds else 0.0,
        "goodput_rps": sum(met(o) for o in ended) / seconds if seconds else 0.0,
        "tokens_per_s": sum(o.tokens for o in ended) / seconds if seconds else 0.0,
        "ttft_ms": _percentiles([ttft(o) for o in ended]),
        "tpot_ms": _percentiles([tpot(o) for o in ended if o.tokens > 1]),
        "e2e_ms": _percentiles([o.finished - o.job.request.arrival for o in ended]),
        "floor_violations": sum(o.least < o.job.request.k_min for o in ended),
    }
    of_tokens: Counter[int] = Counter()
    of_prompts: Counter[int] = Counter()
    for outcome in ended:
        of_tokens.update(outcome.token_budgets)
        of_prompts.update(outcome.prompt_budgets)
    for part, counts in (("", of_tokens), ("prompt_", of_prompts)):
        budgets, weights = list(counts), list(counts.values())
        record[f"mean_{part}k"] = float(np.average(budgets, weights=weights)) if counts else math.nan
        if kl is not None:
            known = sorted(kl)
            losses = np.interp(budgets, known, [kl[k] for k in known])
            record[f"mean_{part}kl"] = float(np.average(losses, weights=weights)) if counts else math.nan
    return record


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {f"p{p}": math.nan for p in PERCENTILES}
    values = np.percentile(np.array(seconds) * 1e3, PERCENTILES)
    return {f"p{p}": float(v) for p, v in zip(PERCENTILES, values, strict=True)}

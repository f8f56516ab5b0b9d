"""What a request asks of quality and speed, from ``vllm_xargs`` over HTTP or ``SamplingParams.extra_args`` offline.

Knows nothing of vLLM's classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import PrismError
from ..scheduling.quality import budget_bounds

MOST_MS = 1e7  # as on our own server


class Quality(NamedTuple):
    """One request's.

    Attributes:
        k_min: floor.
        k_active: the most that is wanted, at least the floor.
        ttft_ms: wanted time to first token, or None.
        tpot_ms: wanted time per later token, or None.
    """

    k_min: int
    k_active: int
    ttft_ms: float | None = None
    tpot_ms: float | None = None


def quality_of(extra_args: Mapping[str, Any] | None, full_budget: int, floor: int) -> Quality:
    """Read and check a request's arguments; those of others are left alone.

    Args:
        extra_args: name -> value.
        full_budget: k * N.
        floor: of requests that name neither ``k_min`` nor ``k_active``.

    Raises:
        PrismError: a value of the wrong kind or out of range.
    """
    given = extra_args or {}
    k_min, k_active = (_whole(name, given.get(name), full_budget) for name in ("k_min", "k_active"))
    ttft, tpot = (_milliseconds(name, given.get(name)) for name in ("ttft_ms", "tpot_ms"))
    return Quality(*budget_bounds(k_min, k_active, full_budget, floor), ttft, tpot)


def _whole(name: str, value: Any, full_budget: int) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise PrismError(f"vllm_xargs.{name} must be a whole number from 1 to {full_budget} (full budget), got {value!r}")


def _milliseconds(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= MOST_MS:
        raise PrismError(f"vllm_xargs.{name} must be above 0 and at most {MOST_MS:g} milliseconds, got {value!r}")
    return float(value)

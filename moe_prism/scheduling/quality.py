"""What a request says of its quality, as the two budgets that policies work with.

The same rule for every server. Knows no engine and no protocol.
"""

from __future__ import annotations

from ..errors import PrismError


class BudgetError(PrismError):
    """A budget out of range; ``field`` is the name of the one at fault, ``k_min`` or ``k_active``."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def budget_bounds(k_min: int | None, k_active: int | None, full_budget: int, default: int) -> tuple[int, int]:
    """Floor and most wanted budget of a request.

    ``k_active`` alone is also the floor: exactly this budget. ``k_min`` alone leaves everything above it to the
    server. With neither, the server's default floor holds.

    Args:
        k_min: the floor, where it is named.
        k_active: the most that is wanted, where it is named.
        full_budget: k * N.
        default: floor of requests that name neither.

    Raises:
        BudgetError: out of range.
    """
    for name, value in (("k_min", k_min), ("k_active", k_active)):
        if value is not None and not 1 <= value <= full_budget:
            raise BudgetError(name, f"vllm_xargs.{name} must be from 1 to {full_budget} (full budget), got {value}")
    most = full_budget if k_active is None else k_active
    unnamed = default if k_active is None else most
    floor = unnamed if k_min is None else k_min
    if floor > most:
        raise BudgetError(
            "k_min", f"vllm_xargs.k_min must be from 1 to k_active = {most}, got {floor}; raise k_active or lower k_min"
        )
    return floor, most


def budget_buckets(full_budget: int) -> list[int]:
    """Of a histogram of budgets: at most 64 upper bounds, equally far apart; the last is full budget."""
    step = -(-full_budget // 64)
    return sorted({*range(step, full_budget, step), full_budget})

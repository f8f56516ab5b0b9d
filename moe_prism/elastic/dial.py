"""The dial of one model: how many sub-experts its tokens may run, now.

One object is shared by all layers of a model. Knows nothing of scores or weights.
"""

from __future__ import annotations

from ..errors import PrismError


class Dial:
    """The budget in force.

    Attributes:
        full_budget: k * N; at it the model takes its own path.
        k_active: the budget of every token, 1..full_budget.
    """

    def __init__(self, full_budget: int) -> None:
        self.full_budget = full_budget
        self.k_active = full_budget

    def check(self, k_active: int) -> int:
        """``k_active`` itself; raises PrismError if it is not a whole number in range."""
        if isinstance(k_active, bool) or not isinstance(k_active, int) or not 1 <= k_active <= self.full_budget:
            raise PrismError(
                f"k_active must be a whole number from 1 to {self.full_budget} (full budget), got {k_active!r}"
            )
        return k_active

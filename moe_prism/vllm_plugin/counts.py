"""What the scheduler counts about budgets, as whole numbers under flat names: they cross vLLM's process boundary.

Knows nothing of vLLM or of Prometheus.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from ..scheduling import Request

PREFIX = "moe_prism/"


class Counts:
    """Since the last ``take``: generated tokens by budget, those below what was wanted, those below a floor.

    Args:
        full_budget: largest budget.
    """

    def __init__(self, full_budget: int) -> None:
        self.full_budget = full_budget
        self._now: Counter[str] = Counter()

    def token(self, wanted: Request, budget: int) -> None:
        """A token of a request is computed at a budget."""
        self._now[f"{PREFIX}budget/{budget}"] += 1
        self._now[f"{PREFIX}floor/{wanted.k_min}"] += 1
        if budget < wanted.k_active:
            self._now[f"{PREFIX}degraded"] += 1
        if budget < wanted.k_min:
            self._now[f"{PREFIX}violations"] += 1

    def take(self) -> dict[str, int]:
        """The counts; they begin again."""
        now, self._now = self._now, Counter()
        return dict(now)


def found(counts: Mapping[str, int], kind: str) -> Iterator[tuple[int, int]]:
    """(value, tokens) of one kind, "budget" or "floor", among counts that crossed over."""
    begin = f"{PREFIX}{kind}/"
    for name, tokens in counts.items():
        if name.startswith(begin):
            yield int(name[len(begin) :]), tokens

"""Prompts to compute, in the order in which they are computed, and how much of them fits into a step.

Knows no engine and no order of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..cost_model import CostModel, Floats, Ints
from .excess import as_good, largest


class Line(NamedTuple):
    """Prompts to compute, ``[Q]`` in their order.

    Attributes:
        names: their ids.
        tokens: left of each.
        starts: computed of each.
        budgets: at every excess, ``[F, Q]``.
        due: seconds until the first token is due.
        times: predicted seconds until it is there at every excess, ``[F, Q]``.
    """

    names: list[str]
    tokens: Floats
    starts: Floats
    budgets: Ints
    due: Floats
    times: Floats

    def largest(self, ease: float) -> int:
        """The largest excess with which all are in time; ``ease`` is the share of the time they may take."""
        if not self.names:
            return len(self.budgets) - 1
        return largest((self.times <= ease * self.due).all(axis=1), self.times[:, -1])

    def as_good(self, excess: int) -> int:
        """The largest excess at which all of it takes hardly longer."""
        return as_good(excess, self.times[:, -1]) if self.names else excess

    def pieces(
        self, cost: CostModel, excess: int, room: float, least: float, piece: int, most: int | None
    ) -> list[int]:
        """Prompt tokens of this step, ``[Q]``.

        Args:
            cost: predicts their times.
            excess: of the prompts.
            room: seconds that they may take.
            least: tokens that are computed whatever they take.
            piece: the fewest tokens of a prompt that is cut.
            most: tokens of a step, or None.
        """
        seconds = cost.prefill_curve(self.tokens, self.starts, self.budgets[excess : excess + 1])[0]
        part = np.clip((room - (np.cumsum(seconds) - seconds)) / seconds, 0.0, 1.0)
        tokens = np.floor(part * self.tokens)
        tokens[(part < 1.0) & (tokens < piece)] = 0.0
        if tokens.sum() < least:
            tokens = _first(self.tokens, least)
        if most is not None and tokens.sum() > most:
            tokens = _first(tokens, most)
        return [int(count) for count in tokens.tolist()]


def _first(tokens: Floats, most: float) -> Floats:
    """The first ``most`` of tokens in a row, by request."""
    taken: Floats = np.clip(most - (np.cumsum(tokens) - tokens), 0.0, tokens)
    return taken

"""Which tokens of the key-value memory belong to whom: every request has one run of consecutive places.

A run is as long as prompt and ``max_tokens``, so a request that was admitted never lacks memory, and attention reads it
where it lies. If what is free lies in pieces that are all too short, runs are moved together; so whatever fits by its
sum fits. Knows no tensors.
"""

from __future__ import annotations

from typing import NamedTuple

from ..errors import PrismError


class Run(NamedTuple):
    """Places ``start .. start + length - 1``."""

    start: int
    length: int


class Move(NamedTuple):
    """A run that now starts somewhere lower."""

    id: str
    source: int
    target: int


class Memory:
    """Runs in a memory of ``tokens`` places.

    Attributes:
        tokens: how many places there are.
        used: how many are reserved.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.used = 0
        self._runs: dict[str, Run] = {}  # in the order of memory

    def start(self, id: str) -> int:
        """The first place of a request's run."""
        return self._runs[id].start

    def reserve(self, id: str, length: int) -> list[Move]:
        """Reserve a run; the moves have to be carried out, in this order, before it is used.

        Raises:
            PrismError: not so much is free.
        """
        if length > self.tokens - self.used:
            raise PrismError(
                f"request {id} needs memory for {length} tokens, {self.tokens - self.used} of {self.tokens} are free"
            )
        gap = self._gap(length)
        moves = self._compact() if gap is None else []
        run = Run(self.used if gap is None else gap, length)
        self._runs = dict(sorted([*self._runs.items(), (id, run)], key=lambda item: item[1]))
        self.used += length
        return moves

    def free(self, id: str) -> None:
        """Give a run back."""
        self.used -= self._runs.pop(id).length

    def _gap(self, length: int) -> int | None:
        """The start of the shortest gap that is long enough."""
        best: Run | None = None
        end = 0
        for run in [*self._runs.values(), Run(self.tokens, 0)]:
            free = run.start - end
            if free >= length and (best is None or free < best.length):
                best = Run(end, free)
            end = run.start + run.length
        return None if best is None else best.start

    def _compact(self) -> list[Move]:
        moves = []
        end = 0
        for id, run in self._runs.items():
            if run.start != end:
                moves.append(Move(id, run.start, end))
                self._runs[id] = Run(end, run.length)
            end += run.length
        return moves

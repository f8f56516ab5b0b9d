"""Elastic by the clock: a token has a time, and runs what is in memory and those reads that are worth their time.

A token's floor comes first, whatever it takes. What is in memory costs no reading, so it runs as well, up to the
budget. Then blocks are read in the order of their weighted scores until the time of the layer is spent: what is left of
the token's time, less what computing the rest of it takes, over the layers that are left. Time that a layer does not
use goes to those after it. Where blocks have a copy at fewer bits, a miss is first read as that, a part of the time;
what time is left reads the best of them as stored. Knows nothing of files or models: it is told what is in memory and
how long a read takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import PrismError

# What the latest token counts in the estimates.
NEWEST = 0.2
_GOLDEN = 0.6180339887498949


class Shadow(NamedTuple):
    """A copy of the blocks at fewer bits.

    Attributes:
        part: of a block's bytes, above 0.
        present: whether a block's copy is in memory, or on its way.
    """

    part: float
    present: Callable[[int], bool]


@dataclass
class Pace:
    """The clock of a model's tokens.

    Attributes:
        layers: L, whose blocks are read.
        read_seconds: of one block, when others are read as well; measured, and kept up to date.
        stalled: seconds that layers have waited for reads so far.
        clock: seconds.
        seconds: of a token; None: no deadline, every token runs its budget.
        ran, places: sub-experts that ran under a deadline, and tokens times layers: see ``mean_budget``.
        low: of those that ran, how many from a copy at fewer bits.
    """

    layers: int
    read_seconds: float
    stalled: Callable[[], float]
    clock: Callable[[], float] = time.perf_counter
    seconds: float | None = None
    ran: int = 0
    places: int = 0
    low: int = 0
    _begun: float = field(default=0.0, init=False, repr=False)
    _marks: list[tuple[float, float]] = field(default_factory=list, init=False, repr=False)  # time, stall
    _rest: list[float] | None = field(default=None, init=False, repr=False)  # computing after each layer's choice
    _tail: float | None = field(default=None, init=False, repr=False)  # and after the last one's
    _dither: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.read_seconds <= 0 or (self.seconds is not None and self.seconds <= 0):
            raise PrismError(f"times must be above 0 s, got {self.seconds} a token and {self.read_seconds} a block")

    @property
    def mean_budget(self) -> float:
        """Sub-experts that a token ran in a layer, on average."""
        return self.ran / max(1, self.places)

    @property
    def mean_low(self) -> float:
        """Of these, those that ran from a copy at fewer bits."""
        return self.low / max(1, self.places)

    def reads(self, layer: int, part: float = 1.0) -> int:
        """How many blocks a layer may read; to be asked layer by layer, once a token.

        Of the first token only the floor is read: how long computing takes is not known yet.

        Args:
            layer: its number.
            part: of a block's time that one read takes.
        """
        now, stalled = self.clock(), self.stalled()
        if layer == 0:
            self._learn(now)
            self._begun = now
        self._marks.append((now, stalled))
        if self.seconds is None or self._rest is None:
            return 0
        left = (self._begun + self.seconds - now - self._rest[layer]) / (part * self.read_seconds)
        self._dither = (self._dither + _GOLDEN) % 1  # parts of a block add up over layers and tokens
        return max(0, int(min(left, left / (self.layers - layer) + self._dither)))

    def choose(
        self,
        layer: int,
        scores: Tensor,
        chosen: Tensor,
        floor: Tensor,
        blocks: Tensor,
        present: Callable[[int], bool],
        shadow: Shadow | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The candidates that run in the time there is.

        Args:
            layer: its number.
            scores: ``[T, C]`` of the candidates, what they are compared by.
            chosen: bool ``[T, C]``, the budget.
            floor: bool ``[T, C]``, part of it: what runs as stored, whatever it takes.
            blocks: int64 ``[T, C]``, each candidate's block.
            present: whether a block is in memory, or on its way.
            shadow: of the copy at fewer bits, if there is one.

        Returns:
            bool ``[T, C]``: the floor, and part of the rest of ``chosen``; and which of these run from the copy.
        """
        part = 1.0 if shadow is None else shadow.part
        reads = self.reads(layer, part)
        wanted = blocks[chosen].numpy()
        there = {block: present(block) for block in np.unique(wanted).tolist()}
        must = {block for block in blocks[floor].tolist() if not there[block]}
        values: dict[int, float] = {}
        for block, score in zip(wanted.tolist(), scores[chosen].tolist(), strict=True):
            if not there[block] and block not in must:
                values[block] = values.get(block, 0.0) + score
        best = sorted(values, key=lambda block: -values[block])
        stored, low = _worth(best, reads - len(must) / part, part, shadow)
        runs = {block for block, here in there.items() if here} | must | stored

        def among(some: set[int]) -> Tensor:
            return torch.from_numpy(np.isin(blocks.numpy(), list(some)))

        lowered = chosen & among(low) & ~floor
        out = chosen & (among(runs) | floor) | lowered
        self.ran += int(out.sum())
        self.low += int(lowered.sum())
        self.places += len(out)
        return out, lowered

    def observe(self, read_seconds: float) -> None:
        """A block took so long of late."""
        self.read_seconds += NEWEST * (read_seconds - self.read_seconds)

    def _learn(self, now: float) -> None:
        """From the token that has just ended: how long it computed after each layer's choice."""
        marks, self._marks = self._marks, []
        if len(marks) != self.layers:
            return
        end, stalled = marks[-1]
        # What lies between two tokens may be a pause; the least of late is work. The last layer's stall is part of it.
        tail = max(0.0, now - end - (self.stalled() - stalled))
        self._tail = tail if self._tail is None else min(tail, self._tail * 1.1)
        rest = [self._tail + (end - at) - (stalled - before) for at, before in marks]
        old = rest if self._rest is None else self._rest
        self._rest = [(1 - NEWEST) * a + NEWEST * b for a, b in zip(old, rest, strict=True)]


def _worth(best: list[int], reads: float, part: float, shadow: Shadow | None) -> tuple[set[int], set[int]]:
    """Which of the missing blocks, the best first, are read as stored, and which run from the copy.

    Args:
        best: missing blocks.
        reads: that there is time for, in units of ``part`` of a block.
        part: see ``Shadow``; 1 without a copy.
        shadow: the copy.
    """
    if shadow is None:
        return set(best[: max(0, int(reads))]), set()
    low: dict[int, float] = {}  # and what reading it costs
    for block in best:
        cost = 0.0 if shadow.present(block) else 1.0
        if cost <= max(0.0, reads):
            low[block] = cost
            reads -= cost
    stored: set[int] = set()
    for block, cost in list(low.items()):
        more = 1 / part - cost
        if more <= reads:
            stored.add(block)
            del low[block]
            reads -= more
    return stored, set(low)

"""Which cached block goes when another needs its place: one small class per rule, registered under a name.

A rule is told of every use and asked for a victim among the blocks that may go. Knows nothing of bytes or files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..errors import PrismError
from ..registry import Registry

Blocks = NDArray[np.int64]
Values = NDArray[np.float64]


class EvictionRule(ABC):
    """Base of all rules; an instance belongs to one cache.

    Attributes:
        at_once: victims that may be chosen together: what is used meanwhile becomes worth more, and is taken out.
    """

    at_once: ClassVar[int] = 16

    @abstractmethod
    def used(self, blocks: Blocks, values: Values, now: float) -> None:
        """A step uses blocks.

        Args:
            blocks: different ones.
            values: each one's share of the step's routing weights, 0..1.
            now: how often all layers were run so far, by the steps of all of them; in decoding, tokens.
        """

    @abstractmethod
    def keep(self, candidates: Blocks) -> Values:
        """How much each of some resident blocks is worth keeping; the one with the least is evicted."""


EVICTION: Registry[EvictionRule] = Registry("eviction rule")


def _fitted(array: NDArray[np.float64], blocks: Blocks) -> NDArray[np.float64]:
    """An array by block, long enough for these."""
    need = int(blocks.max(initial=-1)) + 1
    return array if need <= len(array) else np.pad(array, (0, 2 * need - len(array)))


@EVICTION.register("lru")
@dataclass
class LeastRecentlyUsed(EvictionRule):
    """The block that was not used for the longest time goes (the paper's rule, arXiv 2510.19366)."""

    _last: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), init=False, repr=False)
    _uses: int = field(default=0, init=False, repr=False)

    def used(self, blocks: Blocks, values: Values, now: float) -> None:
        """See ``EvictionRule.used``."""
        self._last = _fitted(self._last, blocks)
        self._last[blocks] = self._uses + 1 + np.arange(len(blocks))
        self._uses += len(blocks)

    def keep(self, candidates: Blocks) -> Values:
        """See ``EvictionRule.keep``; blocks that were read ahead and never used go first."""
        self._last = _fitted(self._last, candidates)
        return self._last[candidates]


@dataclass
class _Decayed:
    """Sums of weights by block, each halved every ``half_life`` of the clock."""

    half_life: float
    _sum: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), init=False, repr=False)
    _at: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0), init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.half_life > 0:
            raise PrismError(f"a half-life must be above 0 tokens, got {self.half_life}")

    def of(self, blocks: Blocks, now: float) -> NDArray[np.float64]:
        """The sums at some time."""
        self._sum, self._at = _fitted(self._sum, blocks), _fitted(self._at, blocks)
        sums: NDArray[np.float64] = self._sum[blocks] * np.exp2((self._at[blocks] - now) / self.half_life)
        return sums

    def add(self, blocks: Blocks, weights: Values | float, now: float) -> None:
        """Add to some blocks."""
        self._sum[blocks], self._at[blocks] = self.of(blocks, now) + weights, now


@EVICTION.register("lfu-decay")
@dataclass
class LeastFrequentlyUsed(EvictionRule):
    """The block that was used least often goes, where older uses count less.

    Attributes:
        half_life: tokens after which a use counts half.
    """

    half_life: float = 64.0
    _uses: _Decayed = field(init=False, repr=False)
    _now: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        self._uses = _Decayed(self.half_life)

    def used(self, blocks: Blocks, values: Values, now: float) -> None:
        """See ``EvictionRule.used``."""
        self._now = now
        self._uses.add(blocks, 1.0, now)

    def keep(self, candidates: Blocks) -> Values:
        """See ``EvictionRule.keep``."""
        return self._uses.of(candidates, self._now)


@EVICTION.register("gate-aware")
@dataclass
class GateAware(LeastFrequentlyUsed):
    """The block that was wanted least goes: uses weighted by their share of the routing weights, decaying.

    Attributes:
        half_life: tokens after which a use counts half.
    """

    def used(self, blocks: Blocks, values: Values, now: float) -> None:
        """See ``EvictionRule.used``."""
        self._now = now
        self._uses.add(blocks, values, now)


@EVICTION.register("frequent-recent")
@dataclass
class FrequentRecent(EvictionRule):
    """The block with the least chance of a use goes, by its frequency in the long run and in the last few tokens.

    The chance is the mean of (1 where a token used the block, else 0) over past tokens with weights that halve every
    ``half_life`` tokens, plus ``recency`` times the same with ``short_life``: which experts a model prefers, and that a
    token's experts are likely to be the next one's as well.

    Attributes:
        half_life: of the long run, in tokens.
        short_life: of what is recent, in tokens.
        recency: what a recent use counts beside the long run.
    """

    half_life: float = 64.0
    short_life: float = 1.0
    recency: float = 0.2
    _long: _Decayed = field(init=False, repr=False)
    _short: _Decayed = field(init=False, repr=False)
    _now: float = field(default=0.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.recency >= 0:
            raise PrismError(f"recency must be 0 or more, got {self.recency}")
        self._long, self._short = _Decayed(self.half_life), _Decayed(self.short_life)

    def used(self, blocks: Blocks, values: Values, now: float) -> None:
        """See ``EvictionRule.used``."""
        self._now = now
        self._long.add(blocks, 1.0, now)
        self._short.add(blocks, 1.0, now)

    def keep(self, candidates: Blocks) -> Values:
        """See ``EvictionRule.keep``."""
        # A sum divided by the sum of all its weights is the mean.
        share = (1 - 0.5 ** (1 / self.short_life)) / (1 - 0.5 ** (1 / self.half_life))
        often = self._long.of(candidates, self._now)
        kept: Values = often + self.recency * share * self._short.of(candidates, self._now)
        return kept


@EVICTION.register("belady")
@dataclass
class Belady(EvictionRule):
    """The block whose next use is farthest away goes: the bound that no rule can beat, for recorded traces.

    Attributes:
        trace: the uses to come, in order.
    """

    at_once: ClassVar[int] = 1  # what was just used may be what is used again last

    trace: Sequence[int] = ()
    _next: dict[int, deque[int]] = field(default_factory=lambda: defaultdict(deque), init=False, repr=False)

    def __post_init__(self) -> None:
        for position, block in enumerate(self.trace):
            self._next[block].append(position)

    def used(self, blocks: Blocks, values: Values, now: float) -> None:
        """See ``EvictionRule.used``."""
        for block in blocks.tolist():
            uses = self._next[block]
            if not uses:
                raise PrismError(f"block {block} was used more often than the trace says; record the trace anew")
            uses.popleft()

    def keep(self, candidates: Blocks) -> Values:
        """See ``EvictionRule.keep``: the sooner the next use, the more."""
        uses = [self._next[block] for block in candidates.tolist()]
        return -np.array([waiting[0] if waiting else np.inf for waiting in uses], np.float64)

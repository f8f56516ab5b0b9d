"""Which cached block goes when another needs its place: one small class per rule, registered under a name.

A rule is told of every use and asked for a victim among the blocks that may go. Knows nothing of bytes or files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ..errors import PrismError
from ..registry import Registry


class EvictionRule(ABC):
    """Base of all rules; an instance belongs to one cache."""

    @abstractmethod
    def used(self, block: int, value: float) -> None:
        """A block was used; ``value`` is its share of the step's routing weights, 0..1."""

    @abstractmethod
    def victim(self, resident: Iterable[int], free: Callable[[int], bool]) -> int | None:
        """The block to evict: a resident one for which ``free`` holds; None if there is none."""

    def dropped(self, block: int) -> None:  # noqa: B027 - most rules keep their memory of evicted blocks
        """A block has left the cache."""


EVICTION: Registry[EvictionRule] = Registry("eviction rule")


@EVICTION.register("lru")
@dataclass
class LeastRecentlyUsed(EvictionRule):
    """The block that was not used for the longest time goes (the paper's rule, arXiv 2510.19366)."""

    _order: OrderedDict[int, None] = field(default_factory=OrderedDict, init=False, repr=False)

    def used(self, block: int, value: float) -> None:
        """See ``EvictionRule.used``."""
        self._order[block] = None
        self._order.move_to_end(block)

    def victim(self, resident: Iterable[int], free: Callable[[int], bool]) -> int | None:
        """See ``EvictionRule.victim``; blocks that were read ahead and never used go first."""
        unused = next((block for block in resident if block not in self._order and free(block)), None)
        return unused if unused is not None else next((block for block in self._order if free(block)), None)

    def dropped(self, block: int) -> None:
        """See ``EvictionRule.dropped``."""
        self._order.pop(block, None)


@dataclass
class _Decaying(EvictionRule):
    """The block with the least weight goes; a weight halves every ``half_life`` uses of any block."""

    half_life: float = 4096.0
    _weight: dict[int, float] = field(default_factory=dict, init=False, repr=False)
    _unit: float = field(default=1.0, init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.half_life > 0:
            raise PrismError(f"half_life must be above 0 uses, got {self.half_life}")

    def add(self, block: int, weight: float) -> None:
        # Instead of shrinking all weights, what is added grows; before it overflows all are scaled back.
        self._unit *= 2.0 ** (1.0 / self.half_life)
        if self._unit > 1e100:
            self._weight = {known: value / self._unit for known, value in self._weight.items()}
            self._unit = 1.0
        self._weight[block] = self._weight.get(block, 0.0) + weight * self._unit

    def victim(self, resident: Iterable[int], free: Callable[[int], bool]) -> int | None:
        """See ``EvictionRule.victim``."""
        return min((block for block in resident if free(block)), key=lambda b: self._weight.get(b, 0.0), default=None)


@EVICTION.register("lfu-decay")
@dataclass
class LeastFrequentlyUsed(_Decaying):
    """The block that was used least often goes, where older uses count less.

    Attributes:
        half_life: uses (of all blocks) after which one use counts half.
    """

    def used(self, block: int, value: float) -> None:
        """See ``EvictionRule.used``."""
        self.add(block, 1.0)


@EVICTION.register("gate-aware")
@dataclass
class GateAware(_Decaying):
    """The block that was wanted least goes: uses weighted by their share of the routing weights, decaying.

    Attributes:
        half_life: uses (of all blocks) after which one use counts half.
    """

    def used(self, block: int, value: float) -> None:
        """See ``EvictionRule.used``."""
        self.add(block, value)


@EVICTION.register("belady")
@dataclass
class Belady(EvictionRule):
    """The block whose next use is farthest away goes: the bound that no rule can beat, for recorded traces.

    Attributes:
        trace: the uses to come, in order.
    """

    trace: Sequence[int] = ()
    _next: dict[int, deque[int]] = field(default_factory=lambda: defaultdict(deque), init=False, repr=False)

    def __post_init__(self) -> None:
        for position, block in enumerate(self.trace):
            self._next[block].append(position)

    def used(self, block: int, value: float) -> None:
        """See ``EvictionRule.used``."""
        uses = self._next[block]
        if not uses:
            raise PrismError(f"block {block} was used more often than the trace says; record the trace anew")
        uses.popleft()

    def victim(self, resident: Iterable[int], free: Callable[[int], bool]) -> int | None:
        """See ``EvictionRule.victim``."""

        def away(block: int) -> float:
            uses = self._next[block]
            return uses[0] if uses else float("inf")

        return max((block for block in resident if free(block)), key=away, default=None)

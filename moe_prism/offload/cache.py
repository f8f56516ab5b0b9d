"""Places in memory for blocks: which block is where, which may go.

Bookkeeping only: no bytes, no threads (the manager holds its lock). A block is *loading* until its read has ended,
*held* while a step needs it; neither kind is evicted. It is *promised* from when it is read ahead until the layer that
it was read for has said what it needs: such a block goes only for one that somebody waits for, if no other can.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..errors import PrismError
from .eviction import EvictionRule


@dataclass
class BlockCache:
    """``slots`` places and what is in them.

    Attributes:
        slots: how many.
        rule: who goes.
        place: block -> its slot, loading ones included.
        held: blocks that the step in progress still needs, whether they are in memory or not.
        promised: blocks read ahead for a layer to come.
    """

    slots: int
    rule: EvictionRule
    place: dict[int, int] = field(default_factory=dict, init=False)
    held: set[int] = field(default_factory=set, init=False)
    promised: set[int] = field(default_factory=set, init=False)
    _empty: list[int] = field(init=False, repr=False)
    _next: list[int] = field(default_factory=list, init=False, repr=False)  # to be evicted, the last one first
    _loading: set[int] = field(default_factory=set, init=False, repr=False)
    _block: NDArray[np.int64] = field(init=False, repr=False)  # in each slot
    _busy: NDArray[np.bool_] = field(init=False, repr=False)  # held or loading, by slot

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise PrismError(f"a cache needs at least one place, got {self.slots}; raise --memory")
        self._empty = list(range(self.slots))[::-1]
        self._block = np.full(self.slots, -1)
        self._busy = np.zeros(self.slots, bool)

    def ready(self, block: int) -> bool:
        """Whether a block is in memory, whole."""
        return block in self.place and block not in self._loading

    def loading(self, block: int) -> bool:
        """Whether a block is being read."""
        return block in self._loading

    def hold(self, blocks: Collection[int]) -> None:
        """Keep blocks from being evicted, now or once they are in memory."""
        self.held.update(blocks)
        self._next = [block for block in self._next if block not in self.held]  # a used block is worth more again
        for block in blocks:
            self._mark(block)

    def let_go(self, block: int) -> None:
        """A block is not needed any longer."""
        self.held.discard(block)
        self._mark(block)

    def admit(self, block: int, ahead: bool = False) -> int | None:
        """A place for a block that will now be read; None if there is none.

        Args:
            block: which.
            ahead: nobody waits for it yet, so it takes no place that is promised to another.
        """
        if not self._empty:
            victim = self._victim(ahead)
            if victim is None:
                return None
            self.remove(victim)
        slot = self._empty.pop()
        self.place[block], self._block[slot] = slot, block
        self._loading.add(block)
        if ahead:
            self.promised.add(block)
        self._mark(block)
        return slot

    def _victim(self, ahead: bool) -> int | None:
        """The block to evict. Looking at all of them takes long, so some are chosen at once for the next calls."""
        while self._next:
            block = self._next.pop()
            slot = self.place.get(block)
            if slot is not None and not self._busy[slot] and block not in self.promised:
                return block
        candidates = self._block[~self._busy]
        if self.promised:
            others = candidates[~np.isin(candidates, list(self.promised))]
            candidates = others if ahead or len(others) else candidates
        if not len(candidates):
            return None
        worth, count = self.rule.keep(candidates), self.rule.at_once
        least = np.argpartition(worth, count)[:count] if len(worth) > count else np.arange(len(worth))
        order = least[np.argsort(worth[least], kind="stable")]
        self._next = candidates[order[::-1]].tolist()
        return self._next.pop()

    def rehearse(self, blocks: Sequence[int], values: Sequence[float], now: float) -> int:
        """A step in which every read takes no time: bookkeeping for plans; returns the blocks that were not there.

        Args:
            blocks: different ones, at most as many as there are slots.
            values: routing weight of each.
            now: as of ``EvictionRule.used``.
        """
        shares = np.asarray(values, np.float64)
        self.rule.used(np.asarray(blocks, np.int64), shares / (shares.sum() or 1.0), now)
        self.hold(blocks)
        missing = [block for block in blocks if block not in self.place]
        for block in missing:
            self.admit(block)
            self.arrived(block)
        for block in blocks:
            self.let_go(block)
        return len(missing)

    def arrived(self, block: int) -> None:
        """A read has ended well."""
        self._loading.discard(block)
        self._mark(block)

    def remove(self, block: int) -> None:
        """Take a block out: evicted, or its read failed."""
        slot = self.place.pop(block)
        self._loading.discard(block)
        self.promised.discard(block)
        self._block[slot], self._busy[slot] = -1, False
        self._empty.append(slot)

    def _mark(self, block: int) -> None:
        slot = self.place.get(block)
        if slot is not None:
            self._busy[slot] = block in self.held or block in self._loading

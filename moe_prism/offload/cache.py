"""Places in memory for blocks: which block is where, which may go.

Bookkeeping only: no bytes, no threads (the manager holds its lock). A block is *loading* until its read has ended,
*held* while a step needs it; neither kind is evicted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """

    slots: int
    rule: EvictionRule
    place: dict[int, int] = field(default_factory=dict, init=False)
    _empty: list[int] = field(init=False, repr=False)
    held: set[int] = field(default_factory=set, init=False)
    _loading: set[int] = field(default_factory=set, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise PrismError(f"a cache needs at least one place, got {self.slots}; raise --memory")
        self._empty = list(range(self.slots))[::-1]

    def ready(self, block: int) -> bool:
        """Whether a block is in memory, whole."""
        return block in self.place and block not in self._loading

    def loading(self, block: int) -> bool:
        """Whether a block is being read."""
        return block in self._loading

    def free(self, block: int) -> bool:
        """Whether a resident block may be evicted."""
        return block not in self.held and block not in self._loading

    def admit(self, block: int) -> int | None:
        """A place for a block that will now be read; None if everything is held or being read."""
        if not self._empty:
            victim = self.rule.victim(self.place, self.free)
            if victim is None:
                return None
            self.remove(victim)
        slot = self._empty.pop()
        self.place[block] = slot
        self._loading.add(block)
        return slot

    def arrived(self, block: int) -> None:
        """A read has ended well."""
        self._loading.discard(block)

    def remove(self, block: int) -> None:
        """Take a block out: evicted, or its read failed."""
        self._loading.discard(block)
        self._empty.append(self.place.pop(block))
        self.rule.dropped(block)

"""Blocks on demand and ahead of demand: reader threads between a slow tier and a fast one.

A step names the blocks that it needs; what is in memory can be computed at once, while the rest is being read
(arXiv 2510.19366, phase 2: L(t) = Latency_IO(S_miss) + Latency_compute(S_req), here overlapped). Reads that somebody
waits for come before reads ahead; a read ahead that turns out wrong is ended. One step at a time. Knows nothing of
models or scores.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import PrismError
from .cache import BlockCache
from .eviction import EvictionRule
from .guessing import Guessing
from .statistics import Statistics
from .tiers import Tier

READERS = 3
# A quarter of a layer's predictions whose reads were right less often than this, of late, is read in one of PROBE
# tokens only. A wrong read takes the disk's time and another block's place; a right one saves no bytes, only waiting.
TRUST = 0.6
PROBE = 16
# How often a read was right, by quarter of the prediction, before anything is known (recorded routing, docs/log.md).
_FIRST_TRUST = (0.8, 0.75, 0.65, 0.5)
# What the latest read counts in that.
_NEWEST = 0.1


class Ready(NamedTuple):
    """A block in memory: its position among the wanted ones, and its slot."""

    position: int
    slot: int


class Manager:
    """A cache of blocks with readers.

    Attributes:
        tier: where the blocks are.
        layout: of the blocks.
        cache: which of them.
        statistics: see ``Statistics``.
        guessing: whether the next layer's blocks should be guessed.
        readers: the threads that read.
    """

    def __init__(self, tier: Tier, rule: EvictionRule, readers: int = READERS, beside: Manager | None = None) -> None:
        """Start the readers.

        Args:
            tier: empty; closed together with the manager.
            rule: who is evicted.
            readers: threads that read.
            beside: another manager of the same model, whose blocks are needed in the same steps: both count together,
                and closing that one closes this one.

        Raises:
            PrismError: a number below 1.
        """
        if readers < 1:
            raise PrismError(f"readers must be 1 or more threads, got {readers}")
        self.tier, self.layout = tier, tier.layout
        self.cache = BlockCache(tier.slots, rule)
        self.statistics: Statistics = Statistics() if beside is None else beside.statistics
        # One lock for both: it guards the counts as well. A step waits for a change, readers for work of their own:
        # waking those who have nothing to do takes the interpreter from the one who computes.
        self._lock: threading.RLock = threading.RLock() if beside is None else beside._lock
        self._change: threading.Condition = threading.Condition(self._lock) if beside is None else beside._change
        self._work = threading.Condition(self._lock)
        self.guessing = Guessing()
        self._companions: list[Manager] = []
        if beside is not None:
            beside._companions.append(self)
        self._wanted: OrderedDict[int, None] = OrderedDict()
        self._ahead: OrderedDict[int, int] = OrderedDict()  # and its quarter
        self._predicted: dict[int, frozenset[int]] = {}
        self._begun: dict[int, dict[int, int]] = {}  # reads ahead by layer, and their quarters
        self._trust: dict[tuple[int, int], float] = {}  # by layer and quarter
        self._cancelled: set[int] = set()
        self._failed: dict[int, Exception] = {}
        self._steps = 0
        self._closed = False
        self.readers = [
            threading.Thread(target=self._read, name=f"block-reader-{i}", daemon=True) for i in range(readers)
        ]
        for thread in self.readers:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the readers, close the tier, and do the same for managers beside this one."""
        for other in self._companions:
            other.close()
        with self._change:
            self._closed = True
            self._work.notify_all()
        for thread in self.readers:
            thread.join()
        self.tier.close()

    def present(self, block: int) -> bool:
        """Whether a block is in memory or on its way; safe without the lock, since it promises nothing."""
        return block in self.cache.place

    def step(self, blocks: Sequence[int] | NDArray[np.int64], values: Sequence[float] | NDArray[np.floating]) -> Step:
        """Begin a step: holds what is in memory, asks for the rest.

        Args:
            blocks: different ones, at most as many as there are slots, of one layer.
            values: routing weight of each, summed over tokens; the rule sees shares of their sum.
        """
        if len(blocks) > self.cache.slots:
            raise PrismError(
                f"a step needs {len(blocks)} blocks at once, the cache holds {self.cache.slots}; raise --memory"
            )
        shares = np.array(values, np.float64)
        shares /= shares.sum() or 1.0
        numbers = np.asarray(blocks, np.int64)
        wanted: list[int] = numbers.tolist()
        with self._change:
            self._judge(wanted)
            self.guessing.step(self.statistics.stall_seconds)
            self.cache.rule.used(numbers, shares, self._steps / len(self.layout.layers))
            self._steps += 1
            self.cache.hold(wanted)
            for block in wanted:
                self._failed.pop(block, None)
                if self.cache.ready(block):
                    self.statistics.hits += 1
                    continue
                self.statistics.misses += 1
                if not self.cache.loading(block):
                    self._wanted[block] = None
            self._call_readers()
        return Step(self, wanted)

    def read_ahead(self, blocks: Iterable[int]) -> None:
        """Read blocks of one later layer when nobody waits for others; replaces what was asked for that layer.

        Where such reads were often wrong, they are only tried now and then.

        Args:
            blocks: the surest first.
        """
        named = list(dict.fromkeys(blocks))
        if not named:
            return
        with self._change:
            layer = self._layer(named[0])
            self._predicted[layer] = frozenset(named)
            probe = self._steps % (PROBE * len(self.layout.layers)) <= layer
            for rank, block in enumerate(named):
                quarter = 4 * rank // len(named)
                good = probe or self._trust.get((layer, quarter), _FIRST_TRUST[quarter]) >= TRUST
                if good and block not in self.cache.place and block not in self._wanted:
                    self._ahead[block] = quarter
            self._call_readers()

    def _call_readers(self) -> None:
        """Wake as many as there is something to read for: they take turns on the processor. The lock is held."""
        self._work.notify(len(self._wanted) + len(self._ahead))

    def _layer(self, block: int) -> int:
        return block // self.layout.per_layer

    def _judge(self, blocks: Sequence[int]) -> None:
        """Compare guesses with what is required; reads ahead that this layer does not need are dropped or ended."""
        layer = self._layer(blocks[0]) if blocks else -1
        required, counted = set(blocks), self.statistics
        predicted = self._predicted.pop(layer, None)
        if predicted is not None:
            counted.predicted += len(predicted)
            counted.predicted_right += len(predicted & required)
            counted.foreseeable += len(required)
        for block, quarter in self._begun.pop(layer, {}).items():
            right = block in required
            counted.ahead_right += right
            before = self._trust.get((layer, quarter), _FIRST_TRUST[quarter])
            self._trust[layer, quarter] = before + _NEWEST * (right - before)
        for block in [b for b in self._ahead if self._layer(b) == layer]:
            del self._ahead[block]
        for block in [b for b in self.cache.promised if self._layer(b) == layer]:
            self.cache.promised.discard(block)
            if block not in required and self.cache.loading(block):
                self._cancelled.add(block)
        self._cancelled -= required

    def _next(self) -> tuple[int, int] | None:
        """The next read and its slot, waiting for one; None when closed. The lock is held."""
        while not self._closed:
            if self._wanted:
                block = next(iter(self._wanted))
                slot = self.cache.admit(block)
                if slot is not None:
                    del self._wanted[block]
                    return block, slot
            elif self._ahead:
                block, quarter = self._ahead.popitem(last=False)
                slot = self.cache.admit(block, ahead=True)
                if slot is not None:
                    self.statistics.ahead += 1
                    self._begun.setdefault(self._layer(block), {})[block] = quarter
                    return block, slot
                continue
            self._work.wait()
        return None

    def _read(self) -> None:
        while True:
            with self._change:
                found = self._next()
            if found is None:
                return
            block, slot = found
            error: Exception | None = None
            whole = False
            try:
                whole = self._fill(block, slot)
            except Exception as raised:  # a reader must survive, whatever it was: the step raises it
                error = raised
            with self._change:
                if whole:
                    self.cache.arrived(block)
                    self.statistics.blocks_read += 1
                else:
                    self.cache.remove(block)
                    if error is not None:
                        self._failed[block] = error
                    elif block in self.cache.held:  # required again after its read was ended
                        self._wanted[block] = None
                    else:
                        self.statistics.cancelled += 1
                self._cancelled.discard(block)
                self._change.notify_all()

    def _fill(self, block: int, slot: int) -> bool:
        def go_on(count: int) -> bool:
            with self._change:
                self.statistics.bytes_read += count
                return block not in self._cancelled

        return self.tier.fill(block, slot, go_on)


class Step:
    """The blocks of one step, as they become ready. Use as a context: leaving it lets go of what is left.

    Iterate for lists of ``Ready``: first what is in memory already, then what has arrived in the meantime. The
    blocks of a list stay where they are until the next one is asked for. A read that failed is raised here.
    """

    def __init__(self, manager: Manager, blocks: list[int]) -> None:
        self._manager, self._blocks = manager, blocks
        self._left = dict.fromkeys(range(len(blocks)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go(list(self._left))

    def __iter__(self) -> Iterator[list[Ready]]:
        change = self._manager._change
        while self._left:
            with change:
                batch = self._ready()
                if not batch:
                    counted = self._manager.statistics
                    begin, read = time.perf_counter(), counted.bytes_read
                    while not batch:
                        change.wait()
                        batch = self._ready()
                    counted.stall_seconds += time.perf_counter() - begin
                    counted.stall_bytes += counted.bytes_read - read
            yield batch
            self._let_go([ready.position for ready in batch])

    def _ready(self) -> list[Ready]:
        manager = self._manager
        for position in self._left:
            failed = manager._failed.pop(self._blocks[position], None)
            if failed is not None:
                raise failed
        cache = manager.cache
        ready = [p for p in self._left if cache.ready(self._blocks[p])]
        return [Ready(position, cache.place[self._blocks[position]]) for position in ready]

    def _let_go(self, positions: list[int]) -> None:
        manager = self._manager
        with manager._change:
            places = [manager.cache.place.get(self._blocks[position], -1) for position in positions]
            manager.tier.used(place for place in places if place >= 0)
            for position in positions:
                del self._left[position]
                manager.cache.let_go(self._blocks[position])
                manager._wanted.pop(self._blocks[position], None)
            manager._call_readers()  # a place may have become free

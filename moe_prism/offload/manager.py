"""Blocks on demand and ahead of demand: reader threads between a block file and the cache.

A step names the blocks that it needs; what is in memory can be computed at once, while the rest is being read
(arXiv 2510.19366, phase 2: L(t) = Latency_IO(S_miss) + Latency_compute(S_req), here overlapped). Reads that somebody
waits for come before reads ahead. One step at a time. Knows nothing of models or scores.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import PrismError
from .block_file import BlockFile, aligned
from .cache import BlockCache
from .eviction import EvictionRule

READERS = 3


@dataclass
class Statistics:
    """Counts since the start.

    Attributes:
        hits, misses: required blocks that were in memory, or were not, when their step began. One that is still being
            read ahead is a miss.
        blocks_read, bytes_read: from the file, both kinds of reads.
        stall_seconds: time that steps waited with nothing to compute.
        predicted, predicted_right: blocks named for read-ahead, and those of them that were then required.
        foreseeable: required blocks of steps that had a prediction.
    """

    hits: int = 0
    misses: int = 0
    blocks_read: int = 0
    bytes_read: int = 0
    stall_seconds: float = 0.0
    predicted: int = 0
    predicted_right: int = 0
    foreseeable: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of required blocks that were in memory; 0 before any was required."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def precision(self) -> float:
        """Share of predicted blocks that were required."""
        return self.predicted_right / max(1, self.predicted)

    @property
    def recall(self) -> float:
        """Share of required blocks that were predicted."""
        return self.predicted_right / max(1, self.foreseeable)

    def since(self, before: Statistics) -> Statistics:
        """What was counted after ``before``."""
        return Statistics(**{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)})


class Ready(NamedTuple):
    """A block in memory: its position among the wanted ones, and its slot."""

    position: int
    slot: int


class Manager:
    """A cache of blocks with readers.

    Attributes:
        statistics: see ``Statistics``.
    """

    def __init__(self, file: BlockFile, slots: int, rule: EvictionRule, readers: int = READERS) -> None:
        """Reserve memory and start the readers.

        Args:
            file: open; closed together with the manager.
            slots: places for blocks.
            rule: who is evicted.
            readers: threads that read.

        Raises:
            PrismError: a number below 1, or no memory.
        """
        if readers < 1:
            raise PrismError(f"readers must be 1 or more threads, got {readers}")
        self.file, self.cache, self.statistics = file, BlockCache(slots, rule), Statistics()
        self._slab = aligned(slots * file.layout.stride)
        self._memory = memoryview(self._slab)  # type: ignore[arg-type]
        self._change = threading.Condition()
        self._wanted: OrderedDict[int, None] = OrderedDict()
        self._ahead: OrderedDict[int, None] = OrderedDict()
        self._predicted: dict[int, frozenset[int]] = {}
        self._failed: dict[int, Exception] = {}
        self._closed = False
        self._threads = [
            threading.Thread(target=self._read, name=f"block-reader-{i}", daemon=True) for i in range(readers)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the readers, drop the cache, close the file."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()
        self.file.close()

    def rows(self) -> NDArray[np.generic]:
        """The cache as rows of weights ``[slots * rows of a stride, H]``: fp32, or the bits of a 16-bit type."""
        layout = self.file.layout
        kind = np.float32 if layout.dtype == "float32" else np.uint16
        return self._slab.view(kind).reshape(-1, layout.hidden_size)

    @property
    def rows_per_slot(self) -> int:
        """Rows from one slot to the next."""
        return self.file.layout.stride // self.file.layout.row_bytes

    def step(self, blocks: Sequence[int], values: Sequence[float]) -> Step:
        """Begin a step: holds what is in memory, asks for the rest.

        Args:
            blocks: different ones, at most as many as there are slots, of one layer.
            values: routing weight of each, summed over tokens; the rule sees shares of their sum.
        """
        if len(blocks) > self.cache.slots:
            raise PrismError(
                f"a step needs {len(blocks)} blocks at once, the cache holds {self.cache.slots}; raise --memory"
            )
        total = sum(values) or 1.0
        with self._change:
            self._judge(blocks)
            self.cache.held.update(blocks)
            for block, value in zip(blocks, values, strict=True):
                self.cache.rule.used(block, value / total)
                self._failed.pop(block, None)
                if self.cache.ready(block):
                    self.statistics.hits += 1
                    continue
                self.statistics.misses += 1
                self._ahead.pop(block, None)
                if not self.cache.loading(block):
                    self._wanted[block] = None
            self._change.notify_all()
        return Step(self, list(blocks))

    def read_ahead(self, blocks: Iterable[int]) -> None:
        """Read blocks of one later layer when nobody waits for others; replaces what was asked for that layer."""
        named = list(dict.fromkeys(blocks))
        if not named:
            return
        with self._change:
            self._predicted[named[0] // self.file.layout.per_layer] = frozenset(named)
            for block in named:
                if block not in self.cache.place and block not in self._wanted:
                    self._ahead[block] = None
            self._change.notify_all()

    def _judge(self, blocks: Sequence[int]) -> None:
        """Compare a prediction with what is required, and forget reads ahead of this layer that nobody needs."""
        per_layer = self.file.layout.per_layer
        layer = blocks[0] // per_layer if blocks else -1
        predicted = self._predicted.pop(layer, None)
        if predicted is not None:
            required = set(blocks)
            self.statistics.predicted += len(predicted)
            self.statistics.predicted_right += len(predicted & required)
            self.statistics.foreseeable += len(required)
        for block in [b for b in self._ahead if b // per_layer == layer]:
            del self._ahead[block]

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
                block, _ = self._ahead.popitem(last=False)
                slot = self.cache.admit(block)
                if slot is not None:
                    return block, slot
                continue
            self._change.wait()
        return None

    def _read(self) -> None:
        stride = self.file.layout.stride
        while True:
            with self._change:
                found = self._next()
            if found is None:
                return
            block, slot = found
            error: Exception | None = None
            try:
                self.file.read(block, self._memory[slot * stride : (slot + 1) * stride])
            except Exception as raised:  # a reader must survive, whatever it was: the step raises it
                error = raised
            with self._change:
                if error is None:
                    self.cache.arrived(block)
                    self.statistics.blocks_read += 1
                    self.statistics.bytes_read += stride
                else:
                    self._failed[block] = error
                    self.cache.remove(block)
                self._change.notify_all()


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
                    begin = time.perf_counter()
                    while not batch:
                        change.wait()
                        batch = self._ready()
                    self._manager.statistics.stall_seconds += time.perf_counter() - begin
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
            for position in positions:
                del self._left[position]
                manager.cache.held.discard(self._blocks[position])
                manager._wanted.pop(self._blocks[position], None)
            manager._change.notify_all()

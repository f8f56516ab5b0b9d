"""The fast tier: places for blocks, filled from a slower one.

``MemoryTier`` is memory filled from a block file on disk. ``DeviceTier`` is the memory of an accelerator filled from
pinned memory of the host by copies on a stream of their own. A tier fills places; which block goes where, and when, is
not its business.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import PrismError
from .block_file import DIGITS, BlockFile, BlockLayout, aligned

GoOn = Callable[[int], bool]


class Tier(ABC):
    """``slots`` places for blocks.

    Attributes:
        layout: of the blocks.
        slots: how many places there are.
        device: where layers compute.
    """

    layout: BlockLayout
    slots: int
    device: torch.device

    @abstractmethod
    def fill(self, block: int, slot: int, go_on: GoOn) -> bool:
        """Bring a block into a place; called from several threads, for different places.

        When it returns, whoever computes next sees the block.

        Args:
            block: which.
            slot: where to. Nobody uses it, but what was computed with its former block may not have ended yet.
            go_on: called with the bytes of every piece that has come; False ends the work.

        Returns:
            Whether the whole block is there.

        Raises:
            CheckpointError: the block cannot be read, or is altered.
        """

    @abstractmethod
    def used(self, slots: Iterable[int]) -> None:
        """Computing with the blocks of these places was begun, and nothing more will be."""

    @abstractmethod
    def rows(self) -> Any:
        """All places as rows of weights ``[slots * rows_per_slot, H]``, where the layers compute.

        Of digits, bytes by place: ``[slots, stride]``.
        """

    @abstractmethod
    def bandwidth(self, readers: int, blocks: int, seed: int = 0) -> float:
        """Bytes per second of bringing that many random blocks by so many threads, with nothing else to do."""

    @abstractmethod
    def close(self) -> None:
        """Give back what was opened."""

    @property
    def rows_per_slot(self) -> int:
        """Rows from one place to the next."""
        return self.layout.stride // self.layout.row_bytes


class MemoryTier(Tier):
    """Memory, filled from a block file."""

    def __init__(self, file: BlockFile, slots: int) -> None:
        """Reserve memory; the file is closed with the tier. Raises PrismError where there is not enough."""
        self.file, self.layout, self.slots, self.device = file, file.layout, slots, torch.device("cpu")
        self._slab = aligned(slots * file.layout.stride)
        self._memory = memoryview(self._slab)  # type: ignore[arg-type]

    def fill(self, block: int, slot: int, go_on: GoOn) -> bool:
        """See ``Tier.fill``."""
        stride = self.layout.stride
        return self.file.read(block, self._memory[slot * stride : (slot + 1) * stride], go_on)

    def used(self, slots: Iterable[int]) -> None:
        """Computing on the CPU has ended when its call returns."""

    def rows(self) -> NDArray[np.generic]:
        """fp32, the bits of a 16-bit type, or bytes of digits."""
        if self.layout.dtype == DIGITS:
            return self._slab.reshape(self.slots, -1)
        kind = np.float32 if self.layout.dtype == "float32" else np.uint16
        return self._slab.view(kind).reshape(-1, self.layout.hidden_size)

    def bandwidth(self, readers: int, blocks: int, seed: int = 0) -> float:
        """See ``Tier.bandwidth``."""

        def read(mine: list[int]) -> None:
            memory = memoryview(aligned(self.layout.stride))  # type: ignore[arg-type]
            for block in mine:
                self.file.read(block, memory)

        return _timed(read, self.layout, readers, blocks, seed)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def _timed(read: Callable[[list[int]], None], layout: BlockLayout, readers: int, blocks: int, seed: int) -> float:
    chosen = np.random.default_rng(seed).permutation(layout.blocks)[:blocks].tolist()
    begin = time.perf_counter()
    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(read, [chosen[i::readers] for i in range(readers)]))
    return len(chosen) * layout.stride / (time.perf_counter() - begin)


class Copies(Protocol):
    """Copies beside the computing, and what orders the two."""

    def mark(self) -> Any:
        """A point in the computing that was begun so far."""

    def copy(self, target: Tensor, source: Tensor, after: Any) -> None:
        """Copy once the computing has passed a mark (None: at once); returns when the copy has ended."""


class StreamCopies:
    """Copies on a CUDA stream of their own. Not tested on a GPU yet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._local = threading.local()

    def mark(self) -> Any:
        """An event on the stream that computes."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def copy(self, target: Tensor, source: Tensor, after: Any) -> None:
        """See ``Copies.copy``; every thread has its stream."""
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self._device)
        stream = self._local.stream
        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            target.copy_(source, non_blocking=True)
        stream.synchronize()


class DeviceTier(Tier):
    """Memory of an accelerator, filled from the host's. Its stream copies are not tested on a GPU yet."""

    def __init__(self, host: Tensor, layout: BlockLayout, slots: int, device: torch.device, copies: Copies) -> None:
        """Reserve the device's memory.

        Args:
            host: uint8 ``[blocks, stride]``, all blocks; pinned, or copies would wait for one another.
            layout: of the blocks.
            slots: places on the device.
            device: where layers compute.
            copies: how blocks get there.
        """
        if layout.dtype == DIGITS:
            raise PrismError("blocks at 4 bits are for the CPU; load the stored ones on this device")
        if host.shape != (layout.blocks, layout.stride):
            raise PrismError(f"blocks in memory must be {layout.blocks} of {layout.stride} bytes, got {host.shape}")
        self.layout, self.slots, self.device = layout, slots, device
        self._host, self._copies = host, copies
        self._slab = torch.zeros(slots, layout.stride, dtype=torch.uint8, device=device)
        self._marks: dict[int, Any] = {}

    def fill(self, block: int, slot: int, go_on: GoOn) -> bool:
        """See ``Tier.fill``; a copy is not ended early, a bus is fast."""
        self._copies.copy(self._slab[slot], self._host[block], self._marks.pop(slot, None))
        return go_on(self.layout.stride)

    def used(self, slots: Iterable[int]) -> None:
        """See ``Tier.used``: a place is filled again when the device has passed this point."""
        mark = self._copies.mark()
        self._marks.update(dict.fromkeys(slots, mark))

    def rows(self) -> Tensor:
        """In the dtype of the blocks, on the device."""
        return self._slab.view(self.layout.torch_dtype).view(-1, self.layout.hidden_size)

    def bandwidth(self, readers: int, blocks: int, seed: int = 0) -> float:
        """See ``Tier.bandwidth``."""

        def read(mine: list[int]) -> None:
            target = torch.empty_like(self._slab[0])
            for block in mine:
                self._copies.copy(target, self._host[block], None)

        return _timed(read, self.layout, readers, blocks, seed)

    def close(self) -> None:
        """Nothing was opened."""


def pinned_blocks(file: BlockFile) -> Tensor:
    """All blocks in pinned memory of the host, checked: uint8 ``[blocks, stride]``."""
    layout = file.layout
    host = torch.empty(layout.blocks, layout.stride, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    staging = aligned(layout.stride)
    for block in range(layout.blocks):
        file.read(block, memoryview(staging))  # type: ignore[arg-type]
        host[block] = torch.from_numpy(staging)
    return host

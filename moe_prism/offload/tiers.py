"""The fast tier: places for blocks, filled from a slower one.

``MemoryTier`` is memory filled from a block file on disk. ``DeviceTier`` is the memory of an accelerator filled from
pinned memory of the host by copies on a stream of their own. A tier fills places; which block goes where, and when, is
not its business.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import PrismError
from .accelerator import Accelerator
from .block_file import DIGITS, BlockFile, BlockLayout, aligned

GoOn = Callable[[int], bool]


class Tier(ABC):
    """``slots`` places for blocks.

    Attributes:
        layout: of the blocks.
        slots: how many places there are.
        device: where layers compute.
        arrays: whether ``rows`` are NumPy's, for the CPU's compiled kernels, or a tensor on the device.
    """

    layout: BlockLayout
    slots: int
    device: torch.device
    arrays: ClassVar[bool]

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

    arrays: ClassVar[bool] = True

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


class DeviceTier(Tier):
    """Memory of an accelerator, filled from the host's. It has not run on a GPU yet."""

    arrays: ClassVar[bool] = False

    def __init__(self, host: Tensor, layout: BlockLayout, slots: int, accelerator: Accelerator) -> None:
        """Reserve the device's memory, and pin the host's.

        Args:
            host: uint8 ``[blocks, stride]``, all blocks, in memory of their own.
            layout: of the blocks.
            slots: places on the device.
            accelerator: where layers compute, and how blocks get there.

        Raises:
            PrismError: blocks at 4 bits, another number of bytes, memory that is not there or cannot be pinned.
        """
        if layout.dtype == DIGITS:
            raise PrismError("blocks at 4 bits are for the CPU; load the stored ones on this device")
        if host.shape != (layout.blocks, layout.stride):
            raise PrismError(f"blocks in memory must be {layout.blocks} of {layout.stride} bytes, got {host.shape}")
        self.layout, self.slots, self.device = layout, slots, accelerator.device
        self._host, self._accelerator = host, accelerator
        try:
            self._slab = torch.empty(slots, layout.stride, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            size = slots * layout.stride / 1e9
            raise PrismError(f"{self.device} has no {size:.2f} GB for blocks ({error}); lower --memory") from None
        accelerator.pin(host)
        self._pinned = True
        # The device may still be using what lay where the places are now.
        self._marks: dict[int, Any] = dict.fromkeys(range(slots), accelerator.mark())

    def fill(self, block: int, slot: int, go_on: GoOn) -> bool:
        """See ``Tier.fill``; a copy is not ended early, a bus is fast."""
        self._accelerator.copy(self._slab[slot], self._host[block], self._marks.pop(slot, None))
        return go_on(self.layout.stride)

    def used(self, slots: Iterable[int]) -> None:
        """See ``Tier.used``: a place is filled again when the device has passed this point."""
        mark = self._accelerator.mark()
        self._marks.update(dict.fromkeys(slots, mark))

    def rows(self) -> Tensor:
        """In the dtype of the blocks, on the device."""
        return self._slab.view(self.layout.torch_dtype).view(-1, self.layout.hidden_size)

    def bandwidth(self, readers: int, blocks: int, seed: int = 0) -> float:
        """See ``Tier.bandwidth``."""

        def read(mine: list[int]) -> None:
            target, mark = torch.empty_like(self._slab[0]), self._accelerator.mark()
            for block in mine:
                self._accelerator.copy(target, self._host[block], mark)

        return _timed(read, self.layout, readers, blocks, seed)

    def close(self) -> None:
        """Unpin the host's memory."""
        if self._pinned:
            self._pinned = False
            self._accelerator.unpin(self._host)


def host_blocks(file: BlockFile, readers: int) -> Tensor:
    """All blocks in memory, checked: uint8 ``[blocks, stride]``.

    Args:
        file: to read, by O_DIRECT straight to where blocks stay.
        readers: threads that read.

    Raises:
        CheckpointError: a block cannot be read, or is altered.
        PrismError: there is not enough memory.
    """
    layout = file.layout
    slab = aligned(layout.blocks * layout.stride)
    memory = memoryview(slab)  # type: ignore[arg-type]

    def read(block: int) -> None:
        file.read(block, memory[block * layout.stride : (block + 1) * layout.stride])

    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(read, range(layout.blocks)))
    return torch.from_numpy(slab).view(layout.blocks, layout.stride)

"""A device that computes later than it is told to, and copies that may run meanwhile. It is the CPU, in fact."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moe_prism.offload.accelerator import Accelerator
from moe_prism.offload.block_file import BlockFile
from moe_prism.offload.tiers import DeviceTier, host_blocks


class FakeDevice(Accelerator):
    """Work is done in order by a thread, some time after it was begun; copies are done by whoever asks for them.

    Attributes:
        memory: that it has, in bytes.
        used: of that, what this process has before there are blocks.
        pinned: bytes of the host's that are pinned now.
    """

    def __init__(self, delay: float = 0.0005, memory: int = 1 << 40, used: int = 0) -> None:
        self.device, self.memory, self.used, self.pinned = torch.device("cpu"), memory, used, 0
        self._work: queue.Queue[Callable[[], object]] = queue.Queue()
        self._delay = delay
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            work = self._work.get()
            time.sleep(self._delay)
            work()

    def begin(self, work: Callable[[], object]) -> None:
        self._work.put(work)

    def finish(self) -> None:
        self.mark().wait(10)

    def capacity(self) -> int:
        return self.memory

    def taken(self) -> int:
        return self.used

    def pin(self, memory: Tensor) -> None:
        self.pinned += memory.nbytes

    def unpin(self, memory: Tensor) -> None:
        self.pinned -= memory.nbytes

    def mark(self) -> threading.Event:
        passed = threading.Event()
        self.begin(passed.set)
        return passed

    def copy(self, target: Tensor, source: Tensor, after: threading.Event | None) -> None:
        if after is not None:
            assert after.wait(10)
        target.copy_(source)


def device_tier(file: BlockFile, slots: int, device: FakeDevice) -> DeviceTier:
    with file:
        return DeviceTier(host_blocks(file, 2), file.layout, slots, device)

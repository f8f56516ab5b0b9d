"""A device that computes later than it is told to, and copies that may run meanwhile."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor

from moe_prism.offload.block_file import BlockFile
from moe_prism.offload.tiers import DeviceTier, pinned_blocks


class FakeDevice:
    """Work is done in order by a thread, some time after it was begun; copies are done by whoever asks for them."""

    def __init__(self, delay: float = 0.0005) -> None:
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

    def mark(self) -> threading.Event:
        passed = threading.Event()
        self.begin(passed.set)
        return passed

    def copy(self, target: Tensor, source: Tensor, after: threading.Event | None) -> None:
        if after is not None:
            assert after.wait(10)
        target.copy_(source)


def device_tier(file: BlockFile, slots: int, device: FakeDevice) -> DeviceTier:
    host, layout = pinned_blocks(file), file.layout
    file.close()
    return DeviceTier(host, layout, slots, torch.device("cpu"), device)

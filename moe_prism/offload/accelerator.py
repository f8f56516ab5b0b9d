"""What an accelerator is to offloading: how much memory it has, pages of the host that it can copy from, copies.

``Cuda`` is the only one there is. It has not run on a GPU yet: its logic is tested with a stand-in that computes late.
Knows nothing of blocks or models.
"""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..errors import PrismError

# Of a process on a CUDA device beside torch's own memory: context, kernels, work space of the matrix products. An
# allowance, not measured.
_CONTEXT = 700 << 20


class Accelerator(ABC):
    """One device, and what orders its computing and the copies beside it.

    Attributes:
        device: where layers compute.
    """

    device: torch.device

    @abstractmethod
    def capacity(self) -> int:
        """Bytes that this process can have of the device's memory, with those that it has already."""

    @abstractmethod
    def taken(self) -> int:
        """Bytes of the device's memory that this process has."""

    @abstractmethod
    def pin(self, memory: Tensor) -> None:
        """Lock memory of the host in its place, or copies from it would wait for one another.

        Raises:
            PrismError: the system does not allow so much.
        """

    @abstractmethod
    def unpin(self, memory: Tensor) -> None:
        """Undo ``pin``, before the memory is given back."""

    @abstractmethod
    def mark(self) -> Any:
        """A point in the computing that was begun so far."""

    @abstractmethod
    def copy(self, target: Tensor, source: Tensor, after: Any) -> None:
        """Copy to the device once its computing has passed a mark (None: at once); returns when the copy has ended."""


class Cuda(Accelerator):
    """A CUDA device; copies run on streams of their own, one a thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._local = threading.local()

    def capacity(self) -> int:
        """What nobody has, and what torch has for this process."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(free) + self.taken()

    def taken(self) -> int:
        """What torch keeps, and an allowance for the rest."""
        return int(torch.cuda.memory_reserved(self.device)) + _CONTEXT

    def pin(self, memory: Tensor) -> None:
        """Registers pages as they are: torch's own pinned memory comes in powers of two."""
        failed = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
        if failed:
            raise PrismError(
                f"{memory.nbytes / 1e9:.2f} GB of host memory cannot be pinned for {self.device}, CUDA error {failed}: "
                "raise the limit of locked memory (`ulimit -l`), or leave out --device to read blocks from disk"
            )

    def unpin(self, memory: Tensor) -> None:
        """See ``Accelerator.unpin``; nothing is in flight, since copies end before they return."""
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def mark(self) -> Any:
        """An event on the stream that computes."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copy(self, target: Tensor, source: Tensor, after: Any) -> None:
        """See ``Accelerator.copy``."""
        if not hasattr(self._local, "stream"):
            self._local.stream = torch.cuda.Stream(self.device)
        stream = self._local.stream
        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            target.copy_(source, non_blocking=True)
        stream.synchronize()


def open_accelerator(name: str) -> Accelerator:
    """The accelerator of a name, ``cuda`` or ``cuda:N``.

    Raises:
        PrismError: another name, no CUDA here, or no device of that number.
    """
    found = re.fullmatch(r"cuda(?::(\d+))?", name)
    if found is None:
        raise PrismError(f"device must be cuda or cuda:N, got {name!r}; without --device the model runs on the CPU")
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "CUDA finds no device or no driver"
        raise PrismError(f"device {name} cannot be used: {why}; leave out --device to run on the CPU")
    number, count = int(found[1] or 0), torch.cuda.device_count()
    if number >= count:
        raise PrismError(f"there is no device {name}: give one of cuda:0 .. cuda:{count - 1}")
    return Cuda(torch.device("cuda", number))

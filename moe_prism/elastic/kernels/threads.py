"""Run a kernel on as many threads as torch would use, safely from any thread and after a fork.

Numba's pool may refuse to be entered twice, so a lock lets one parallel kernel run at a time; the cores
would be shared anyway. A forked child has no pool: it computes on its own thread. How waiting threads wait is
``moe_prism.waiting``'s business, or the user's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import numba
import torch

_LARGEST_POOL: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]


class _Pool:
    def __init__(self) -> None:
        self.forked = False
        self.lock = threading.Lock()

    def after_fork(self) -> None:
        self.forked = True
        self.lock = threading.Lock()  # the parent's may be held by a thread that does not exist here


_POOL = _Pool()
_TOLD = threading.local()  # how many threads Numba was last told to use by the calling thread: telling takes 10 us
os.register_at_fork(after_in_child=_POOL.after_fork)


class Kernel:
    """One kernel, compiled twice; its first argument, the number of threads, is filled in by the call."""

    def __init__(self, serial: Callable[..., Any], parallel: Callable[..., Any]) -> None:
        self._serial = serial
        self._parallel = parallel

    def __call__(self, *arguments: Any) -> Any:
        """Run with ``torch.get_num_threads()`` threads."""
        threads = min(torch.get_num_threads(), _LARGEST_POOL)
        if threads == 1 or _POOL.forked:
            return self._serial(1, *arguments)
        with _POOL.lock:
            if getattr(_TOLD, "threads", None) != threads:
                numba.set_num_threads(threads)
                _TOLD.threads = threads
            return self._parallel(threads, *arguments)

    def alone(self, *arguments: Any) -> Any:
        """Run on the calling thread: work that is less than what waking others costs."""
        return self._serial(1, *arguments)

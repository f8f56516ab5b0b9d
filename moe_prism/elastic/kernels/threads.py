"""Run a kernel on as many threads as torch would use, safely from any thread and after a fork.

Numba's pool may refuse to be entered twice, so a lock lets one parallel kernel run at a time; the cores
would be shared anyway. A forked child has no pool: it computes on its own thread.

Waking a sleeping thread took 50 us at the begin and end of every parallel loop, a third of a layer's time at
one token; so the pool's threads spin for a moment before they sleep. Torch has a pool of its own, with its own
rules.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import numba
import torch

_LARGEST_POOL: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
# Turns that a waiting thread spins: about half a millisecond, longer than the work between two layers.
_SPIN = "30000"
_SPIN_VARIABLE = "GOMP_SPINCOUNT"


class _Pool:
    def __init__(self) -> None:
        self.forked = False
        self.started = False
        self.lock = threading.Lock()

    def set_threads(self, threads: int) -> None:
        """How many threads the next loop uses; the lock is held."""
        if self.started or _SPIN_VARIABLE in os.environ:
            numba.set_num_threads(threads)
            return
        # Numba loads its OpenMP with the first call, and that reads the variable once; nobody else shall see it.
        os.environ[_SPIN_VARIABLE] = _SPIN
        try:
            numba.set_num_threads(threads)
            self.started = True
        finally:
            del os.environ[_SPIN_VARIABLE]

    def after_fork(self) -> None:
        self.forked = True
        self.lock = threading.Lock()  # the parent's may be held by a thread that does not exist here


_POOL = _Pool()
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
            _POOL.set_threads(threads)
            return self._parallel(threads, *arguments)

"""Lets vLLM start in a process that has imported Numba.

When a worker starts, vLLM 0.32 looks through every module for its Triton kernels, and trips over an object of llvmlite
that answers to any name, ``__dict__`` included. Its modules are out of sight meanwhile. Numba is what our kernels are
compiled with, so such processes are ours. Knows nothing else of either.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from vllm.triton_utils import dispatcher

_MARK = "_moe_prism"


def install() -> None:
    """From now on vLLM's search passes llvmlite by; doing it twice changes nothing."""
    search = dispatcher._rebind_kernels
    if hasattr(search, _MARK):
        return

    @functools.wraps(search)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "llvmlite"}
        try:
            return search(*args, **kwargs)
        finally:
            sys.modules.update(hidden)

    setattr(guarded, _MARK, True)
    dispatcher._rebind_kernels = guarded

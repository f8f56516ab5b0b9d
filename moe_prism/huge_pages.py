"""Weights that are read from end to end lie better in pages of 2 MB than of 4 kB. On Linux; elsewhere nothing happens.

Knows addresses, not what lies there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

SIZE = 1 << 21
_COLLAPSE, _PREFER = 25, 14  # MADV_COLLAPSE (Linux 6.1): now; MADV_HUGEPAGE: when the kernel finds the time
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages(address: int, size: int) -> None:
    """Let memory that is in use lie in huge pages as far as whole ones fit, if the system allows them.

    It is moved page by page (0.3 s a GB), so no more of it is needed. A layer's weights were read 1.1 times as fast
    (docs/log.md). Where the system has none to give, or forbids them, everything stays as it is.

    Args:
        address: of the first byte.
        size: in bytes.
    """
    first, length = _inside(address, size)
    advise = _madvise()
    if advise is not None and length > 0 and advise(first, length, _COLLAPSE):
        advise(first, length, _PREFER)


def prefer_huge_pages(address: int, size: int) -> None:
    """The same for memory that nobody has touched yet: it comes in huge pages when it is."""
    first, length = _inside(address, size)
    advise = _madvise()
    if advise is not None and length > 0:
        advise(first, length, _PREFER)


def _inside(address: int, size: int) -> tuple[int, int]:
    first = -(-address // SIZE) * SIZE
    return first, (address + size) // SIZE * SIZE - first


@cache
def _madvise() -> Callable[[int, int, int], int] | None:
    try:
        allowed = "[never]" not in _SETTING.read_text()
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    advise: Callable[[int, int, int], int] = function
    return advise if allowed else None

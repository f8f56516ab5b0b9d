"""How the solvers' inner loops are compiled. Knows nothing of what they compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Numba without the GIL, so that experts can be solved on several threads; the code is cached on disk."""
    # Reassociation lets a reduction use SIMD lanes. "ninf" stays out: the solvers use infinities.
    return cast(Function, njit(nogil=True, cache=True, fastmath={"reassoc", "nsz", "contract", "nnan"})(function))

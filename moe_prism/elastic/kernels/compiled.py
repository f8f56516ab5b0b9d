"""How kernels are compiled, and bfloat16 for a compiler that does not know it.

Weights stay in the dtype of the checkpoint; arithmetic is fp32. A bfloat16 array travels as its uint16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])

# Sums may be reordered and fused, which vectorises them; NaN and infinities keep their meaning.
_FAST = {"reassoc", "contract", "nsz", "arcp"}


def inner(function: Function) -> Function:
    """Compile a loop that kernels call."""
    return cast(Function, njit(nogil=True, cache=True, fastmath=_FAST)(function))


def serial(function: Function) -> Function:
    """Compile a kernel for one thread."""
    return cast(Function, njit(nogil=True, cache=True)(function))


def parallel(function: Function) -> Function:
    """Compile the same kernel for Numba's threads."""
    return cast(Function, njit(nogil=True, cache=True, parallel=True)(function))


def _widen(_context: Any, value: Any) -> Any:
    """fp32 value of a stored weight: uint16 bits are bfloat16, float32 is itself."""
    if value == types.float32:
        return types.float32(types.float32), lambda _c, _b, _s, arguments: arguments[0]
    if value != types.uint16:
        return None

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        wide = builder.shl(builder.zext(arguments[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(wide, ir.FloatType())

    return types.float32(types.uint16), generate


widen: Any = intrinsic(_widen)

"""How kernels are compiled, and bfloat16 for a compiler that does not know it.

Weights stay in the dtype of the checkpoint; arithmetic is fp32. A bfloat16 array travels as its uint16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar, cast

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

Function = TypeVar("Function", bound=Callable[..., Any])

# Sums may be reordered and fused, which vectorises them; NaN and infinities keep their meaning.
_FAST = {"reassoc", "contract", "nsz", "arcp"}


def inner(function: Function) -> Function:
    """Compile a loop that kernels call; dividing by zero gives infinity, as a check would leave it unvectorised."""
    return cast(Function, njit(nogil=True, cache=True, fastmath=_FAST, error_model="numpy")(function))


def serial(function: Function) -> Function:
    """Compile a kernel for one thread."""
    return cast(Function, njit(nogil=True, cache=True)(function))


def parallel(function: Function) -> Function:
    """Compile the same kernel for Numba's threads."""
    # Numba's cache on disk goes by name and does not look at "parallel": the twins need two names.
    twin = FunctionType(function.__code__, function.__globals__, f"{function.__name__}_parallel")
    twin.__qualname__ = f"{function.__qualname__}_parallel"
    twin.__module__ = function.__module__
    return cast(Function, njit(nogil=True, cache=True, parallel=True)(twin))


RUN = 32
"""Rows that one task covers: long enough to be read as a stream, short enough to share the work evenly."""


@inner
def share_tasks(starts: Any, runs: int, parts: int, threads: int) -> Any:
    """Where each thread's tasks begin: int64 ``[threads + 1]``.

    A group has ``parts * runs`` tasks, numbered in the order of memory. A thread gets consecutive ones, so
    that it reads long streams, and about the same work: that of reading a row plus that of its tokens.
    """
    groups = starts.shape[0] - 1
    total = 0
    for group in range(groups):
        total += _work(starts[group + 1] - starts[group])
    bounds = np.zeros(threads + 1, np.int64)
    thread, passed = 1, 0
    for group in range(groups):
        work = _work(starts[group + 1] - starts[group])
        while thread < threads and (passed + work) * threads >= total * thread:
            inside = (total * thread / threads - passed) / work
            bounds[thread] = group * parts * runs + int(inside * parts * runs + 0.5)
            thread += 1
        passed += work
    bounds[thread:] = groups * parts * runs
    return bounds


@inner
def _work(tokens: int) -> int:
    return 3 + tokens


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


def _narrow(_context: Any, value: Any, like: Any) -> Any:
    """An fp32 value in the dtype of ``like``: itself, or rounded to nearest even as the bits of a bfloat16."""
    if value != types.float32 or like not in (types.float32, types.uint16):
        return None
    if like == types.float32:
        return types.float32(value, like), lambda _c, _b, _s, arguments: arguments[0]

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        near = builder.lshr(builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF))), ir.Constant(word, 16))
        number = builder.fcmp_ordered("ord", arguments[0], arguments[0])
        return builder.trunc(builder.select(number, near, ir.Constant(word, 0x7FC0)), ir.IntType(16))

    return types.uint16(value, like), generate


narrow: Any = intrinsic(_narrow)


@inner
def round_into(values: Any, out: Any) -> None:
    """fp32 numbers in the dtype of ``out``, of the same length."""
    for i in range(out.shape[0]):
        out[i] = narrow(values[i], out[i])

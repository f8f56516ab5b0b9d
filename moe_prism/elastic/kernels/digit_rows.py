"""One row of 4-bit digits times a token, and added to one.

Unpacking digits takes longer than waiting for their bytes, so the sums of all groups of a row share one vector and are
added up once; a compiler's own loop adds up every group, at a third of the speed. Knows the packing of
``experts.shadow``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.extending import intrinsic

from .streams import FLOATS, WIDTH, Code, types

_BYTES = ir.VectorType(ir.IntType(8), WIDTH)
_WORDS = ir.VectorType(ir.IntType(32), WIDTH)
_WORD, _INDEX, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()


def _fits(digits: Any, scale: Any, vector: Any) -> bool:
    wanted = ((digits, types.uint8), (scale, types.uint16), (vector, types.float32))
    return all(isinstance(a, types.Array) and (a.layout, a.ndim, a.dtype) == ("C", 1, dtype) for a, dtype in wanted)


class _Digits(Code):
    """Instructions of one loop over the groups of a row: 16 bytes, 32 digits, one scale."""

    def __init__(self, builder: Any, digits: Any, scale: Any, vector: Any) -> None:
        self.builder = builder
        self.digits, self.scale, self.vector = digits.data, scale.data, vector.data
        self.groups = builder.extract_value(scale.shape, 0)

    def halves(self, g: Any) -> tuple[Any, Any]:
        """Digits less 8 of the first and of the last 16 elements of a group, as fp32."""
        place = self.at(self.digits, self.builder.mul(g, _INDEX(WIDTH)))
        packed = self.builder.load(self.builder.bitcast(place, _BYTES.as_pointer()), align=1)
        low = self.builder.and_(packed, ir.Constant(_BYTES, [15] * WIDTH))
        high = self.builder.lshr(packed, ir.Constant(_BYTES, [4] * WIDTH))
        first, second = (self.builder.sub(part, ir.Constant(_BYTES, [8] * WIDTH)) for part in (low, high))
        return tuple(self.builder.sitofp(self.builder.sext(part, _WORDS), FLOATS) for part in (first, second))

    def factor(self, g: Any) -> Any:
        """The scale of a group."""
        bits = self.builder.zext(self.builder.load(self.at(self.scale, g)), _WORD)
        return self.builder.bitcast(self.builder.shl(bits, ir.Constant(_WORD, 16)), _FLOAT)

    def places(self, g: Any) -> tuple[Any, Any]:
        """Where the two halves of a group are in the vector."""
        begin = self.builder.mul(g, _INDEX(2 * WIDTH))
        return self.at(self.vector, begin), self.at(self.vector, self.builder.add(begin, _INDEX(WIDTH)))


def _dot_digits(_context: Any, digits: Any, scale: Any, v: Any) -> Any:
    """``sum of scale * (digit - 8) * v``.

    Called with: digits uint8 ``[H / 2]``; scale ``[H / 32]``, the bits of bfloat16; v fp32 ``[H]``.
    """
    if not _fits(digits, scale, v):
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = _code(context, builder, signature, arguments, (0, 1, 2))
        total = builder.alloca(FLOATS)
        builder.store(ir.Constant(FLOATS, [0.0] * WIDTH), total)
        with code.loop(_INDEX(0), code.groups, 1) as (g, _):
            first, second = code.halves(g)
            here, there = code.places(g)
            group = builder.fmul(first, code.floats(here))
            group = code.multiply_add(second, code.floats(there), group)
            builder.store(code.multiply_add(group, code.broadcast(code.factor(g)), builder.load(total)), total)
        return code.sum(builder.load(total))

    return types.float32(digits, scale, v), generate


def _add_digits(_context: Any, y: Any, w: Any, digits: Any, scale: Any) -> Any:
    """``y += w * scale * (digit - 8)``.

    Called with: y fp32 ``[H]``; w fp32; digits and scale as in ``dot_digits``.
    """
    if not _fits(digits, scale, y) or w != types.float32:
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = _code(context, builder, signature, arguments, (2, 3, 0))
        with code.loop(_INDEX(0), code.groups, 1) as (g, _):
            factor = code.broadcast(builder.fmul(arguments[1], code.factor(g)))
            for part, place in zip(code.halves(g), code.places(g), strict=True):
                value = code.multiply_add(part, factor, code.floats(place))
                builder.store(value, builder.bitcast(place, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(y, w, digits, scale), generate


def _code(context: Any, builder: Any, signature: Any, arguments: Any, which: tuple[int, int, int]) -> _Digits:
    return _Digits(builder, *(context.make_array(signature.args[i])(context, builder, arguments[i]) for i in which))


dot_digits: Any = intrinsic(_dot_digits)
add_digits: Any = intrinsic(_add_digits)

"""Four rows at a time for one token: the loops that wait for memory, with the rows to come asked for ahead.

The compiler's own loops reached 0.8 of the machine's reading bandwidth, since the processor does not see that the
next four rows follow; one prefetch for every 16 weights takes it to 0.95. Numba has no vectors and no
prefetch, so these two loops are written in its intermediate language. Knows C-contiguous rows only.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types as _types
from numba.core import cgutils as _cgutils
from numba.extending import intrinsic

# Without annotations upstream.
cgutils: Any = _cgutils
types: Any = _types
WIDTH = 16  # two registers of AVX2, one of AVX-512
_ROWS = 4
_BYTE, _HALF, _WORD, _INDEX, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
FLOATS = ir.VectorType(_FLOAT, WIDTH)
_HALVES = ir.VectorType(_HALF, WIDTH)
_WORDS = ir.VectorType(_WORD, WIDTH)
_INDICES = types.UniTuple(types.int64, _ROWS)
_SUMS = types.UniTuple(types.float32, _ROWS)


def _fits(rows: Any, *vectors: Any) -> bool:
    arrays = (rows, *vectors)
    return (
        all(isinstance(array, types.Array) and array.layout == "C" for array in arrays)
        and rows.ndim == 2
        and rows.dtype in (types.float32, types.uint16)
        and all(vector.ndim == 1 and vector.dtype == types.float32 for vector in vectors)
    )


class Code:
    """Instructions of one loop over rows of bfloat16 (as uint16) or fp32."""

    def __init__(self, context: Any, builder: Any, kind: Any, rows: Any) -> None:
        self.builder = builder
        array = context.make_array(kind)(context, builder, rows)
        self.data = array.data
        self.hidden = builder.extract_value(array.shape, 1)
        self.whole = builder.and_(self.hidden, ir.Constant(_INDEX, -WIDTH))
        self.is_bfloat16 = kind.dtype == types.uint16

    def starts(self, indices: Any) -> list[Any]:
        """Pointers to the rows of a tuple of indices."""
        values = cgutils.unpack_tuple(self.builder, indices, _ROWS)
        return [self.builder.gep(self.data, [self.builder.mul(value, self.hidden)]) for value in values]

    def loop(self, start: Any, stop: Any, step: int) -> Any:
        """A loop over int64."""
        return cgutils.for_range_slice(self.builder, start, stop, ir.Constant(_INDEX, step), _INDEX)

    def at(self, pointer: Any, h: Any) -> Any:
        """The address of element h."""
        return self.builder.gep(pointer, [h])

    def floats(self, pointer: Any) -> Any:
        """16 fp32 values at an address."""
        return self.builder.load(self.builder.bitcast(pointer, FLOATS.as_pointer()), align=4)

    def weights(self, pointer: Any) -> Any:
        """16 weights as fp32."""
        if not self.is_bfloat16:
            return self.floats(pointer)
        halves = self.builder.load(self.builder.bitcast(pointer, _HALVES.as_pointer()), align=2)
        shift = ir.Constant(_WORDS, [16] * WIDTH)
        return self.builder.bitcast(self.builder.shl(self.builder.zext(halves, _WORDS), shift), FLOATS)

    def weight(self, pointer: Any) -> Any:
        """One weight as fp32."""
        value = self.builder.load(pointer)
        if not self.is_bfloat16:
            return value
        return self.builder.bitcast(self.builder.shl(self.builder.zext(value, _WORD), ir.Constant(_WORD, 16)), _FLOAT)

    def prefetch(self, pointer: Any) -> None:
        """Ask for a line, to read, into all caches; an address outside of memory does nothing."""
        address = _BYTE.as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [address, _WORD, _WORD, _WORD])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0i8")
        self.builder.call(function, [self.builder.bitcast(pointer, address), _WORD(0), _WORD(3), _WORD(1)])

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        """``a * b + c``, fused where the machine can."""
        return self.builder.fadd(self.builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))

    def broadcast(self, value: Any) -> Any:
        """A vector of one value."""
        one = self.builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, _WORD(0))
        return self.builder.shuffle_vector(one, ir.Constant(FLOATS, ir.Undefined), ir.Constant(_WORDS, [0] * WIDTH))

    def sum(self, vector: Any) -> Any:
        """Sum of a vector, halves first."""
        width = WIDTH
        while width > 1:
            width //= 2
            lanes = ir.VectorType(_WORD, width)
            halves = [
                self.builder.shuffle_vector(
                    vector,
                    ir.Constant(vector.type, ir.Undefined),
                    ir.Constant(lanes, list(range(first, first + width))),
                )
                for first in (0, width)
            ]
            vector = self.builder.fadd(*halves)
        return self.builder.extract_element(vector, _WORD(0))


def _dot_4_rows(_context: Any, rows: Any, at: Any, ahead: Any, v: Any) -> Any:
    """Four rows times one token.

    Called with: rows ``[R, H]`` (uint16 bits of bfloat16, or fp32); at: indices of four rows; ahead: of the four that
    will be read next, which need not exist; v fp32 ``[H]``. Returns four sums.
    """
    if not _fits(rows, v) or at != _INDICES or ahead != _INDICES:
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = Code(context, builder, signature.args[0], arguments[0])
        token = context.make_array(signature.args[3])(context, builder, arguments[3]).data
        now, later = code.starts(arguments[1]), code.starts(arguments[2])
        sums = [cgutils.alloca_once_value(builder, ir.Constant(FLOATS, [0.0] * WIDTH)) for _ in now]
        with code.loop(_INDEX(0), code.whole, WIDTH) as (h, _):
            x = code.floats(code.at(token, h))
            for row, following, total in zip(now, later, sums, strict=True):
                code.prefetch(code.at(following, h))
                builder.store(code.multiply_add(code.weights(code.at(row, h)), x, builder.load(total)), total)
        totals = [cgutils.alloca_once_value(builder, code.sum(builder.load(total))) for total in sums]
        with code.loop(code.whole, code.hidden, 1) as (h, _):
            x = builder.load(code.at(token, h))
            for row, total in zip(now, totals, strict=True):
                builder.store(code.multiply_add(code.weight(code.at(row, h)), x, builder.load(total)), total)
        return context.make_tuple(builder, signature.return_type, [builder.load(total) for total in totals])

    return _SUMS(rows, at, ahead, v), generate


def _add_4_rows(_context: Any, y: Any, w: Any, rows: Any, at: Any, ahead: Any) -> Any:
    """``y += sum of w[i] * row i`` over four rows.

    Called with: y fp32 ``[H]``; w: four fp32 numbers; rows, at, ahead as in ``dot_4_rows``.
    """
    if not _fits(rows, y) or w != _SUMS or at != _INDICES or ahead != _INDICES:
        return None

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        code = Code(context, builder, signature.args[2], arguments[2])
        out = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        now, later = code.starts(arguments[3]), code.starts(arguments[4])
        ones = cgutils.unpack_tuple(builder, arguments[1], _ROWS)
        wide = [code.broadcast(one) for one in ones]
        with code.loop(_INDEX(0), code.whole, WIDTH) as (h, _):
            place = code.at(out, h)
            total = code.floats(place)
            for row, following, factor in zip(now, later, wide, strict=True):
                code.prefetch(code.at(following, h))
                total = code.multiply_add(code.weights(code.at(row, h)), factor, total)
            builder.store(total, builder.bitcast(place, FLOATS.as_pointer()), align=4)
        with code.loop(code.whole, code.hidden, 1) as (h, _):
            place = code.at(out, h)
            total = builder.load(place)
            for row, factor in zip(now, ones, strict=True):
                total = code.multiply_add(code.weight(code.at(row, h)), factor, total)
            builder.store(total, place)
        return context.get_dummy_value()

    return types.void(y, w, rows, at, ahead), generate


dot_4_rows: Any = intrinsic(_dot_4_rows)
add_4_rows: Any = intrinsic(_add_4_rows)

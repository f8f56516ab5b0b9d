"""Products of bfloat16 pairs, on CPUs that have an instruction for them (AVX512-BF16).

One ``vdpbf16ps`` multiplies 32 pairs and adds them, two by two, to sixteen fp32 sums: twice the arithmetic of an fp32
one, on weights as they are stored. Two kinds of tiles, of up to four tokens, whose sums stay in registers. Addresses
are plain integers: who calls keeps the arrays alive and in bounds. Knows nothing of experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import cache
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

LANES = 16  # fp32 numbers in a register
TILE = 4
COLUMNS = TILE * LANES  # of a tile of sums
# Bytes that tiles of one or two tokens fetch ahead, past the caches: the processor does fetch on its own, but what it
# leaves behind drives out what runs between two layers. With more tokens arithmetic takes the time.
_AHEAD, _FEW = 4096, 2

_WORD, _LONG, _BYTES = ir.IntType(32), ir.IntType(64), ir.IntType(8).as_pointer()


class _BFloat(ir.Type):  # type: ignore[misc]
    """A type that LLVM has and llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_BFLOATS = ir.VectorType(_BFloat(), 2 * LANES)
_PAIRS, _SUMS = ir.VectorType(_WORD, LANES), ir.VectorType(ir.FloatType(), LANES)


def _signature(tokens: int) -> Any:
    addresses: Any = types.Tuple((types.int64,) * tokens)  # type: ignore[no-untyped-call]
    return types.void(types.int64, types.int64, addresses, addresses, types.int64)


@cache
def has_products_of_pairs() -> bool:
    """Whether this CPU has the instruction."""
    return bool(binding.get_host_cpu_features().get("avx512bf16", False))


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=2)


def _fetch(builder: Any, address: Any) -> None:
    """Begin to read the line of an address, for one use; it need not be anybody's memory."""
    signature = ir.FunctionType(ir.VoidType(), [_BYTES, _WORD, _WORD, _WORD])
    fetch = builder.module.declare_intrinsic("llvm.prefetch", (_BYTES,), signature)
    builder.call(fetch, [builder.inttoptr(address, _BYTES), _WORD(0), _WORD(0), _WORD(1)])


def _accumulate(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    signature = ir.FunctionType(_SUMS, [_SUMS, _BFLOATS, _BFLOATS])
    product = builder.module.declare_intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", (), signature)
    return builder.call(product, [sums, builder.bitcast(a, _BFLOATS), builder.bitcast(b, _BFLOATS)])


def _pick(builder: Any, a: Any, b: Any, lanes: Iterable[int]) -> Any:
    """Lanes of two vectors, those of the second counted on."""
    chosen = list(lanes)
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_WORD, len(chosen)), chosen))


def _add_lanes(builder: Any, vectors: list[Any]) -> Any:
    """The sums of the lanes of sixteen vectors, as one vector: half as many, of half as many lanes each, four times."""
    width = LANES
    while len(vectors) > 1:
        low = [lane for lane in range(2 * LANES) if lane % width < width // 2]
        high = [lane + width // 2 for lane in low]
        two = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [builder.fadd(_pick(builder, a, b, low), _pick(builder, a, b, high)) for a, b in two]
        width //= 2
    return vectors[0]


def _loop(builder: Any, turns: Any, tokens: int, body: Any) -> list[Any]:
    """A tile's sums, four for each token, after ``turns`` turns, at least one, of ``body(turn, sums) -> sums``."""
    before = builder.block
    inside, after = builder.append_basic_block("turn"), builder.append_basic_block("done")
    builder.branch(inside)
    builder.position_at_end(inside)
    turn = builder.phi(_LONG)
    sums = [builder.phi(_SUMS) for _ in range(tokens * TILE)]
    found: list[Any] = body(turn, sums)
    following = builder.add(turn, ir.Constant(_LONG, 1))
    turn.add_incoming(ir.Constant(_LONG, 0), before)
    turn.add_incoming(following, builder.block)
    for phi, value in zip(sums, found, strict=True):
        phi.add_incoming(ir.Constant(_SUMS, [0.0] * LANES), before)
        phi.add_incoming(value, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, turns), inside, after)
    builder.position_at_end(after)
    return found


def _dot_tile(_context: Any, rows: Any, stride: Any, tokens: Any, outs: Any, count: Any) -> Any:
    """Four rows times four tokens; see ``dot_tile``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, step, tokens_, outs_, hidden = arguments
        token = [builder.extract_value(tokens_, i) for i in range(TILE)]
        out = [builder.extract_value(outs_, i) for i in range(TILE)]
        row = [builder.add(first, builder.mul(step, ir.Constant(_LONG, i))) for i in range(TILE)]

        def body(turn: Any, sums: list[Any]) -> list[Any]:
            offset = builder.mul(turn, ir.Constant(_LONG, 4 * LANES))
            weights = [_load(builder, builder.add(r, offset), _PAIRS) for r in row]
            values = [_load(builder, builder.add(t, offset), _PAIRS) for t in token]
            both = itertools.product(values, weights)
            return [_accumulate(builder, total, w, v) for total, (v, w) in zip(sums, both, strict=True)]

        sums = _loop(builder, builder.sdiv(hidden, ir.Constant(_LONG, 2 * LANES)), TILE, body)
        total = _add_lanes(builder, sums)
        for t in range(TILE):
            four = _pick(builder, total, total, range(t * TILE, (t + 1) * TILE))
            builder.store(four, builder.inttoptr(out[t], four.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return _signature(TILE), generate


def _sum_tile(tokens: int) -> Any:
    """Weighted sums of row pairs for 1 to 4 tokens; see ``sum_tile``."""

    def typed(_context: Any, rows: Any, stride: Any, weights: Any, outs: Any, count: Any) -> Any:
        return _signature(tokens), generate

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, step, weights_, outs_, pairs = arguments
        weight = [builder.extract_value(weights_, i) for i in range(tokens)]
        out = [builder.extract_value(outs_, i) for i in range(tokens)]

        def body(turn: Any, sums: list[Any]) -> list[Any]:
            row = builder.add(first, builder.mul(step, turn))
            at = builder.mul(turn, ir.Constant(_LONG, 4))
            columns = [_load(builder, builder.add(row, ir.Constant(_LONG, 4 * LANES * j)), _PAIRS) for j in range(TILE)]
            for j in range(TILE if tokens <= _FEW else 0):
                _fetch(builder, builder.add(row, ir.Constant(_LONG, _AHEAD + 4 * LANES * j)))
            found = list(sums)
            for t in range(tokens):
                one = _load(builder, builder.add(weight[t], at), _WORD)
                vector = builder.insert_element(ir.Constant(_PAIRS, ir.Undefined), one, ir.Constant(_WORD, 0))
                spread = _pick(builder, vector, vector, [0] * LANES)
                for j in range(TILE):
                    found[t * TILE + j] = _accumulate(builder, sums[t * TILE + j], columns[j], spread)
            return found

        sums = _loop(builder, pairs, tokens, body)
        for t in range(tokens):
            for j in range(TILE):
                at = builder.add(out[t], ir.Constant(_LONG, 4 * LANES * j))
                place = builder.inttoptr(at, _SUMS.as_pointer())
                builder.store(builder.fadd(builder.load(place, align=4), sums[t * TILE + j]), place, align=4)
        return context.get_dummy_value()

    return intrinsic(typed)


dot_tile: Any = intrinsic(_dot_tile)
"""Four consecutive rows times four tokens.

Called with: address of the first row of bfloat16, bytes between rows, addresses of four tokens of bfloat16, addresses
of four fp32 runs of four, which are written, and the length of rows and tokens, a multiple of 32.
"""
sum_tile, sum_two, sum_one = _sum_tile(TILE), _sum_tile(2), _sum_tile(1)
"""Weighted sums of row pairs, added to 64 columns of four tokens, of two and of one.

Called with: address of the first pair (in every 32-bit word the bfloat16 of the first row and, above it, that of the
second), bytes between pairs, addresses of the tokens' weights in the same form, addresses of as many fp32 runs of 64,
which are added to, and the number of pairs, at least 1. A token's sums do not depend on the others in its tile.
"""

"""The three kernels of the ``triton`` executor; importing this file imports Triton.

A group is the run of pairs of one sub-expert. Every product works on tiles that lie in one group; which
ones there are is known on the device only, so a launch is as wide as the most tiles that could be needed,
and each program finds its own tile or ends at once. They know arrays only: no modules, no selections.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def kernel(function: Callable[..., Any]) -> Any:
    """``triton.jit`` with a type, so that kernels are checked where Triton is not installed."""
    return triton.jit(function)


@kernel
def find_tile(
    starts: tl.tensor, tile: tl.tensor, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr
) -> tl.tuple:
    """Group, first pair and end of the group of a tile; an end of 0 where no such tile is needed."""
    group = tl.arange(0, WIDTH)
    first = tl.load(starts + group, mask=group < GROUPS, other=0)
    end = tl.load(starts + group + 1, mask=group < GROUPS, other=0)
    tiles = (end - first + ROWS - 1) // ROWS
    after = tl.cumsum(tiles, 0)
    before = after - tiles
    mine = (before <= tile) & (tile < after)  # true once, or nowhere
    found = tl.sum(tl.where(mine, group, 0), 0)
    row = tl.sum(tl.where(mine, first + (tile - before) * ROWS, 0), 0)
    return found, row, tl.sum(tl.where(mine, end, 0), 0)


@kernel
def dot(a: tl.tensor, b: tl.tensor, total: tl.tensor, WIDEN: tl.constexpr) -> tl.tensor:
    """``a @ b + total`` in fp32."""
    if WIDEN:  # Triton's interpreter would multiply the bits of bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@kernel
def activate(
    x: tl.tensor,
    gate_up: tl.tensor,
    token: tl.tensor,
    starts: tl.tensor,
    out: tl.tensor,
    GROUPS: tl.constexpr,
    NEURONS: tl.constexpr,
    SIZE: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """``SiLU(x W_gate) * (x W_up)`` of every pair.

    Args:
        x: ``[T, HIDDEN]``.
        gate_up: ``[E, 2 * NEURONS, HIDDEN]``.
        token: ``[S]``, sorted by sub-expert.
        starts: int32 ``[GROUPS + 1]``, where each sub-expert's pairs begin.
        out: ``[S, SIZE]``.
        GROUPS: sub-experts of the layer.
        NEURONS: of an expert.
        SIZE: neurons of a sub-expert.
        HIDDEN: H.
        WIDTH: a power of two, at least GROUPS.
        ROWS: pairs of a tile.
        COLS: neurons of a tile.
        DEPTH: step along HIDDEN.
        WIDEN: multiply in fp32.
    """
    group, row, end = find_tile(starts, tl.program_id(0), ROWS, GROUPS, WIDTH)
    if row < end:
        rows = row + tl.arange(0, ROWS)
        cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
        step = tl.arange(0, DEPTH)
        live = (rows < end)[:, None]
        inside = (cols < SIZE)[None, :]
        tokens = tl.load(token + rows, mask=rows < end, other=0).to(tl.int64)
        parts = NEURONS // SIZE
        # 64 bits: the weights of one layer can have more than 2^31 elements
        first = (group // parts).to(tl.int64) * 2 * NEURONS + (group % parts) * SIZE
        tokens_at = x + tokens[:, None] * HIDDEN + step[None, :]
        gate_at = gate_up + (first + cols)[None, :] * HIDDEN + step[:, None]
        up_at = gate_at + NEURONS * HIDDEN
        gate = tl.zeros((ROWS, COLS), tl.float32)
        up = tl.zeros((ROWS, COLS), tl.float32)
        for k in range(0, HIDDEN, DEPTH):
            known = step < HIDDEN - k
            a = tl.load(tokens_at + k, mask=live & known[None, :], other=0.0)
            w = tl.load(gate_at + k, mask=inside & known[:, None], other=0.0)
            v = tl.load(up_at + k, mask=inside & known[:, None], other=0.0)
            gate = dot(a, w, gate, WIDEN)
            up = dot(a, v, up, WIDEN)
        result = gate * tl.sigmoid(gate) * up
        out_at = out + rows[:, None].to(tl.int64) * SIZE + cols[None, :]
        tl.store(out_at, result.to(out.dtype.element_ty), mask=live & inside)


@kernel
def project(
    activations: tl.tensor,
    down: tl.tensor,
    weight: tl.tensor,
    starts: tl.tensor,
    out: tl.tensor,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Every pair's output, times its routing weight.

    Args:
        activations: ``[S, SIZE]``.
        down: ``[GROUPS * SIZE, HIDDEN]``.
        weight: ``[S]``.
        starts: int32 ``[GROUPS + 1]``.
        out: ``[S, HIDDEN]``.
        GROUPS: sub-experts of the layer.
        SIZE: neurons of a sub-expert.
        HIDDEN: H.
        WIDTH: a power of two, at least GROUPS.
        ROWS: pairs of a tile.
        COLS: output columns of a tile.
        DEPTH: step along SIZE.
        WIDEN: multiply in fp32.
    """
    group, row, end = find_tile(starts, tl.program_id(0), ROWS, GROUPS, WIDTH)
    if row < end:
        rows = row + tl.arange(0, ROWS)
        cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
        step = tl.arange(0, DEPTH)
        live = (rows < end)[:, None]
        inside = (cols < HIDDEN)[None, :]
        active_at = activations + rows[:, None].to(tl.int64) * SIZE + step[None, :]
        down_at = down + (group.to(tl.int64) * SIZE + step)[:, None] * HIDDEN + cols[None, :]
        total = tl.zeros((ROWS, COLS), tl.float32)
        for k in range(0, SIZE, DEPTH):
            known = step < SIZE - k
            a = tl.load(active_at + k, mask=live & known[None, :], other=0.0)
            w = tl.load(down_at + k * HIDDEN, mask=inside & known[:, None], other=0.0)
            total = dot(a, w, total, WIDEN)
        scale = tl.load(weight + rows, mask=rows < end, other=0.0).to(tl.float32)
        out_at = out + rows[:, None].to(tl.int64) * HIDDEN + cols[None, :]
        tl.store(out_at, (total * scale[:, None]).to(out.dtype.element_ty), mask=live & inside)


@kernel
def add_pairs(
    pairs: tl.tensor,
    order: tl.tensor,
    starts: tl.tensor,
    out: tl.tensor,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """Sum of every token's pairs, always in the same order.

    Args:
        pairs: ``[S, HIDDEN]``.
        order: ``[S]``, the pairs sorted by token.
        starts: int32 ``[T + 1]``, where each token's pairs begin in ``order``.
        out: ``[T, HIDDEN]``.
        HIDDEN: H.
        ROWS: pairs added at once.
        COLS: columns of a program.
    """
    token = tl.program_id(0)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = cols < HIDDEN
    first = tl.load(starts + token)
    end = tl.load(starts + token + 1)
    total = tl.zeros((COLS,), tl.float32)
    while first < end:  # the interpreter of Triton 3.6 has no range() over loaded values
        rows = first + tl.arange(0, ROWS)
        pair = tl.load(order + rows, mask=rows < end, other=0).to(tl.int64)
        mask = (rows < end)[:, None] & inside[None, :]
        values = tl.load(pairs + pair[:, None] * HIDDEN + cols[None, :], mask=mask, other=0.0)
        total += tl.sum(values.to(tl.float32), 0)
        first += ROWS
    out_at = out + token.to(tl.int64) * HIDDEN + cols
    tl.store(out_at, total.to(out.dtype.element_ty), mask=inside)


# Triton decides when a kernel is declared, its own library's when it is imported.
INTERPRETED = not any(isinstance(function, triton.JITFunction) for function in (tl.sum, activate))

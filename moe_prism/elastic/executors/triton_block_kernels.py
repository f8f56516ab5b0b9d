"""The kernels of the ``triton`` executor that skip blocks of neurons; importing this file imports Triton.

Gate rows of all neurons first, which gives every block's score; then up and down rows of those blocks only that a pair
of the tile keeps. Tiles never cross the border of a block. They know arrays only, and not how blocks are chosen.
"""

from __future__ import annotations

import triton.language as tl

from .triton_kernels import dot, find_tile, kernel


@kernel
def score_gates(
    x: tl.tensor,
    gate_up: tl.tensor,
    token: tl.tensor,
    weight: tl.tensor,
    scale: tl.tensor,
    starts: tl.tensor,
    gates: tl.tensor,
    score: tl.tensor,
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
    """``weight * SiLU(x W_gate)`` of every pair, and the sum of ``|that| * scale`` over every tile's neurons.

    Args:
        x: ``[T, HIDDEN]``.
        gate_up: ``[E, 2 * NEURONS, HIDDEN]``.
        token: ``[S]``, sorted by sub-expert.
        weight: ``[S]``.
        scale: fp32 ``[GROUPS * SIZE]``.
        starts: int32 ``[GROUPS + 1]``, where each sub-expert's pairs begin.
        gates: fp32 ``[S, SIZE]``, written.
        score: fp32 ``[S, SIZE / COLS]``, written.
        GROUPS: sub-experts of the layer.
        NEURONS: of an expert.
        SIZE: neurons of a sub-expert.
        HIDDEN: H.
        WIDTH: a power of two, at least GROUPS.
        ROWS: pairs of a tile.
        COLS: neurons of a tile; divides SIZE.
        DEPTH: step along HIDDEN.
        WIDEN: multiply in fp32.
    """
    group, row, end = find_tile(starts, tl.program_id(0), ROWS, GROUPS, WIDTH)
    if row < end:
        rows = row + tl.arange(0, ROWS)
        cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
        step = tl.arange(0, DEPTH)
        live = (rows < end)[:, None]
        tokens = tl.load(token + rows, mask=rows < end, other=0).to(tl.int64)
        parts = NEURONS // SIZE
        # 64 bits: the weights of one layer can have more than 2^31 elements
        first = (group // parts).to(tl.int64) * 2 * NEURONS + (group % parts) * SIZE
        tokens_at = x + tokens[:, None] * HIDDEN + step[None, :]
        gate_at = gate_up + (first + cols)[None, :] * HIDDEN + step[:, None]
        gate = tl.zeros((ROWS, COLS), tl.float32)
        for k in range(0, HIDDEN, DEPTH):
            known = step < HIDDEN - k
            a = tl.load(tokens_at + k, mask=live & known[None, :], other=0.0)
            w = tl.load(gate_at + k, mask=known[:, None], other=0.0)
            gate = dot(a, w, gate, WIDEN)
        routed = tl.load(weight + rows, mask=rows < end, other=0.0).to(tl.float32)
        active = gate * tl.sigmoid(gate) * routed[:, None]
        tl.store(gates + rows[:, None].to(tl.int64) * SIZE + cols[None, :], active, mask=live)
        matters = tl.load(scale + group.to(tl.int64) * SIZE + cols)
        score_at = score + rows.to(tl.int64) * (SIZE // COLS) + tl.program_id(1)
        tl.store(score_at, tl.sum(tl.abs(active) * matters[None, :], 1), mask=rows < end)


@kernel
def multiply_up(
    x: tl.tensor,
    gate_up: tl.tensor,
    token: tl.tensor,
    starts: tl.tensor,
    gates: tl.tensor,
    keep: tl.tensor,
    out: tl.tensor,
    GROUPS: tl.constexpr,
    NEURONS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """``gates * (x W_up)`` of the blocks that a pair keeps; what none keeps is neither read nor written.

    Args:
        x: ``[T, HIDDEN]``.
        gate_up: ``[E, 2 * NEURONS, HIDDEN]``.
        token: ``[S]``, sorted by sub-expert.
        starts: int32 ``[GROUPS + 1]``.
        gates: fp32 ``[S, SIZE]``, from ``score_gates``.
        keep: int32 ``[S, SIZE / BLOCK]``, 1 for the blocks of a pair that run.
        out: ``[S, SIZE]``, written where a pair's block runs.
        GROUPS: sub-experts of the layer.
        NEURONS: of an expert.
        SIZE: neurons of a sub-expert.
        BLOCK: neurons of a block; divides SIZE.
        HIDDEN: H.
        WIDTH: a power of two, at least GROUPS.
        ROWS: pairs of a tile.
        COLS: neurons of a tile; divides BLOCK.
        DEPTH: step along HIDDEN.
        WIDEN: multiply in fp32.
    """
    group, row, end = find_tile(starts, tl.program_id(0), ROWS, GROUPS, WIDTH)
    if row < end:
        rows = row + tl.arange(0, ROWS)
        keep_at = keep + rows.to(tl.int64) * (SIZE // BLOCK) + tl.program_id(1) * COLS // BLOCK
        kept = tl.load(keep_at, mask=rows < end, other=0)
        if tl.max(kept, 0) > 0:
            cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
            step = tl.arange(0, DEPTH)
            mine = (kept > 0)[:, None]
            tokens = tl.load(token + rows, mask=rows < end, other=0).to(tl.int64)
            parts = NEURONS // SIZE
            first = (group // parts).to(tl.int64) * 2 * NEURONS + NEURONS + (group % parts) * SIZE
            tokens_at = x + tokens[:, None] * HIDDEN + step[None, :]
            up_at = gate_up + (first + cols)[None, :] * HIDDEN + step[:, None]
            up = tl.zeros((ROWS, COLS), tl.float32)
            for k in range(0, HIDDEN, DEPTH):
                known = step < HIDDEN - k
                a = tl.load(tokens_at + k, mask=mine & known[None, :], other=0.0)
                w = tl.load(up_at + k, mask=known[:, None], other=0.0)
                up = dot(a, w, up, WIDEN)
            at = rows[:, None].to(tl.int64) * SIZE + cols[None, :]
            active = tl.load(gates + at, mask=mine, other=0.0)
            tl.store(out + at, (active * up).to(out.dtype.element_ty), mask=mine)


@kernel
def project_blocks(
    activations: tl.tensor,
    down: tl.tensor,
    starts: tl.tensor,
    keep: tl.tensor,
    out: tl.tensor,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Every pair's output, of the blocks that it keeps; down rows of blocks that no pair of a tile keeps are not read.

    Args:
        activations: ``[S, SIZE]``, from ``multiply_up``.
        down: ``[GROUPS * SIZE, HIDDEN]``.
        starts: int32 ``[GROUPS + 1]``.
        keep: int32 ``[S, SIZE / BLOCK]``.
        out: ``[S, HIDDEN]``, zero for a pair that keeps nothing.
        GROUPS: sub-experts of the layer.
        SIZE: neurons of a sub-expert.
        BLOCK: neurons of a block; divides SIZE.
        HIDDEN: H.
        WIDTH: a power of two, at least GROUPS.
        ROWS: pairs of a tile.
        COLS: output columns of a tile.
        DEPTH: step along BLOCK; divides it.
        WIDEN: multiply in fp32.
    """
    group, row, end = find_tile(starts, tl.program_id(0), ROWS, GROUPS, WIDTH)
    if row < end:
        rows = row + tl.arange(0, ROWS)
        cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
        step = tl.arange(0, DEPTH)
        inside = (cols < HIDDEN)[None, :]
        keep_at = keep + rows.to(tl.int64) * (SIZE // BLOCK)
        active_at = activations + rows[:, None].to(tl.int64) * SIZE + step[None, :]
        down_at = down + (group.to(tl.int64) * SIZE + step)[:, None] * HIDDEN + cols[None, :]
        total = tl.zeros((ROWS, COLS), tl.float32)
        for block in range(SIZE // BLOCK):
            kept = tl.load(keep_at + block, mask=rows < end, other=0)
            if tl.max(kept, 0) > 0:
                mine = (kept > 0)[:, None]
                for k in range(0, BLOCK, DEPTH):
                    a = tl.load(active_at + block * BLOCK + k, mask=mine, other=0.0)
                    w = tl.load(down_at + (block * BLOCK + k) * HIDDEN, mask=inside, other=0.0)
                    total = dot(a, w, total, WIDEN)
        out_at = out + rows[:, None].to(tl.int64) * HIDDEN + cols[None, :]
        tl.store(out_at, total.to(out.dtype.element_ty), mask=(rows < end)[:, None] & inside)

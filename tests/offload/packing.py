"""Packed tiny checkpoints for tests of the offload room."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from making import recipe, save_stock

from moe_prism import make_elastic
from moe_prism.offload import pack_checkpoint
from moe_prism.offload.block_file import BlockLayout, checksum


class Packed(NamedTuple):
    """An elastic checkpoint and what was packed from it."""

    elastic: Path
    packed: Path


def packed(family: str, folder: Path, shadow_bits: Literal[0, 4] = 0, **changes: Any) -> Packed:
    """A tiny model, refactored and packed."""
    stock = save_stock(folder / "stock", family)
    make_elastic(str(stock), folder / "elastic", recipe(**changes))
    pack_checkpoint(folder / "elastic", folder / "packed", shadow_bits=shadow_bits)
    return Packed(folder / "elastic", folder / "packed")


def block_file(path: Path, layers: int = 2, experts: int = 4, seed: int = 0) -> BlockLayout:
    """A block file of random fp32 rows, without a model: 2 sub-experts of 3 neurons an expert, hidden 8."""
    layout = BlockLayout(
        layers=[f"layer{i}" for i in range(layers)],
        num_experts=experts,
        num_sub_experts=2,
        neurons=3,
        hidden_size=8,
        dtype="float32",
        interleaved=False,
        checkpoint="test",
    )
    rng = np.random.default_rng(seed)
    blocks = [rng.standard_normal(layout.stride // 4).astype("<f4").tobytes() for _ in range(layout.blocks)]
    sums = np.array([checksum(block) for block in blocks], "<u8").tobytes()
    path.write_bytes(layout.header() + sums.ljust(layout.blocks_at - layout.table_at, b"\0") + b"".join(blocks))
    return layout


def content(path: Path, layout: BlockLayout, block: int) -> bytes:
    """A block's bytes, read plainly."""
    return path.read_bytes()[layout.offset(block) : layout.offset(block) + layout.stride]

"""The block file: every sub-expert of a checkpoint as one contiguous run of bytes that is read in one piece.

A block holds the rows of its neurons as ``experts.packing`` lays them out, ``[gate | up | down^T]`` (gate and up
interleaved where the family stores them so), padded to whole rows and whole pages. In a file of digits the rows are
the same ones rounded to 4 bits. The file is

    page 0      magic, length of the header, its checksum, the header (JSON)
    pages 1..   one checksum of 8 bytes for every block; 0 where the block is not written yet
    then        the blocks, layer by layer, in the order of sub-experts (expert * N + n)

Checksums are XXH3 of 64 bits: they find damage, not forgery. Knows nothing of models, caches or threads.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Self

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Buffer

from ..errors import CheckpointError, PrismError
from ..experts.shadow import GROUP
from ..huge_pages import prefer_huge_pages

PAGE = 4096
# Of a block, read at once: between two pieces a read that nobody needs any longer can end.
PIECE = 1 << 20
MAGIC = b"MOEPRISM"
VERSION = 1
_PREFIX = struct.Struct("<8sIQ")  # magic, length of the header, its checksum
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Rows of ``experts.shadow`` read at 4 bits: the upper digits, then the scales of their groups.
DIGITS = "digits4"

Positive = Annotated[int, Field(ge=1)]


class BlockLayout(BaseModel):
    """The header of a block file: what its blocks are.

    All layers have the same experts. ``checkpoint`` is a fingerprint of the checkpoint that was packed.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = Field(default=VERSION, ge=1, le=VERSION)
    layers: list[str] = Field(min_length=1)
    num_experts: Positive
    num_sub_experts: Positive
    neurons: Positive = Field(description="Of one sub-expert.")
    hidden_size: Positive
    dtype: str = Field(pattern="|".join([*DTYPES, DIGITS]))
    interleaved: bool = Field(description="Gate and up rows of a neuron are neighbours.")
    checkpoint: str = Field(min_length=1)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the rows; digits are bytes."""
        return torch.uint8 if self.dtype == DIGITS else DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """One row of H weights."""
        if self.dtype == DIGITS:
            return self.hidden_size // 2 + 2 * self.hidden_size // GROUP
        return self.hidden_size * self.torch_dtype.itemsize

    @property
    def rows(self) -> int:
        """Rows of a block that hold weights: gate, up and down of every neuron."""
        return 3 * self.neurons

    @property
    def stride(self) -> int:
        """Bytes from one block to the next: whole pages, and whole rows except of digits."""
        unit = PAGE if self.dtype == DIGITS else math.lcm(PAGE, self.row_bytes)
        return -(-self.rows * self.row_bytes // unit) * unit

    @property
    def per_layer(self) -> int:
        """Blocks of a layer, E * N."""
        return self.num_experts * self.num_sub_experts

    @property
    def blocks(self) -> int:
        """Blocks of the file."""
        return len(self.layers) * self.per_layer

    @property
    def table_at(self) -> int:
        """Where the checksums begin."""
        return -(-(_PREFIX.size + len(self.model_dump_json())) // PAGE) * PAGE

    @property
    def blocks_at(self) -> int:
        """Where the blocks begin."""
        return self.table_at + -(-8 * self.blocks // PAGE) * PAGE

    @property
    def file_bytes(self) -> int:
        """Size of a whole file."""
        return self.blocks_at + self.blocks * self.stride

    def offset(self, block: int) -> int:
        """Where a block begins."""
        return self.blocks_at + block * self.stride

    def name(self, block: int) -> str:
        """A block in words, for messages."""
        layer, sub_expert = divmod(block, self.per_layer)
        expert, part = divmod(sub_expert, self.num_sub_experts)
        return f"{self.layers[layer]}, expert {expert}, sub-expert {part}"

    def header(self) -> bytes:
        """What the file begins with, whole pages."""
        text = self.model_dump_json().encode()
        return (_PREFIX.pack(MAGIC, len(text), checksum(text)) + text).ljust(self.table_at, b"\0")


def checksum(content: Buffer) -> int:
    """XXH3 of some bytes, never 0."""
    return xxhash.xxh3_64_intdigest(content) or 1


def read_layout(path: Path) -> BlockLayout:
    """The validated header of a block file.

    Raises:
        CheckpointError: not a block file, of a future version, or altered in its header.
    """
    try:
        with path.open("rb") as file:
            prefix = file.read(_PREFIX.size)
            magic, length, stated = _PREFIX.unpack(prefix) if len(prefix) == _PREFIX.size else (b"", 0, 0)
            text = file.read(length) if magic == MAGIC else b""
    except OSError as error:
        raise CheckpointError(f"block file {path} cannot be read: {error}; pack the checkpoint again") from None
    if magic != MAGIC:
        raise CheckpointError(f"{path} is not a block file; make one with `moe-prism pack CKPT`")
    if len(text) != length or checksum(text) != stated:
        raise CheckpointError(f"block file {path} is altered or truncated in its header; pack the checkpoint again")
    version = json.loads(text).get("version")
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            f"block file {path} has schema version {version}, this moe-prism reads up to {VERSION}; upgrade moe-prism "
            "or pack again"
        )
    try:
        return BlockLayout.model_validate_json(text)
    except ValidationError as error:
        raise CheckpointError(f"block file {path} has an impossible header: {error}; pack again") from None


class BlockFile:
    """An open, whole block file. Reading is safe from many threads; the file is shared with other processes."""

    def __init__(self, path: Path) -> None:
        """Open and check the size.

        Raises:
            CheckpointError: as ``read_layout``; the file is truncated, or some blocks were never written.
        """
        self.path = path
        self.layout = read_layout(path)
        size = path.stat().st_size
        if size != self.layout.file_bytes:
            raise CheckpointError(
                f"block file {path} has {size} bytes instead of {self.layout.file_bytes}: it is truncated or altered; "
                "pack the checkpoint again"
            )
        with path.open("rb") as file:
            file.seek(self.layout.table_at)
            self._sums = np.frombuffer(file.read(8 * self.layout.blocks), "<u8")
        if not self._sums.all():
            raise CheckpointError(f"block file {path} is not finished; run the same `moe-prism pack` again")
        self.direct = True
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError:  # a file system without it, such as tmpfs
            self.direct = False
            self._descriptor = os.open(path, os.O_RDONLY)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self, block: int, into: memoryview, go_on: Callable[[int], bool] | None = None) -> bool:
        """Read a block into ``stride`` bytes of page-aligned memory; one failed attempt is repeated.

        Args:
            block: which.
            into: where to.
            go_on: called with the bytes of every piece that has come; False ends the reading.

        Returns:
            Whether the whole block was read.

        Raises:
            CheckpointError: the block cannot be read, or is not what was written; names file, offset and block.
        """
        for attempt in (1, 2):
            try:
                return self._read(block, into, go_on)
            except OSError as error:
                if attempt == 2:
                    raise CheckpointError(
                        f"reading block file {self.path} at offset {self.layout.offset(block)} "
                        f"({self.layout.name(block)}) failed twice: {error}"
                    ) from error
        raise AssertionError  # the second attempt returned or raised

    def _read(self, block: int, into: memoryview, go_on: Callable[[int], bool] | None) -> bool:
        begin, done = self.layout.offset(block), 0
        while done < self.layout.stride:
            count = os.preadv(self._descriptor, [into[done : done + PIECE]], begin + done)
            if count == 0:
                raise OSError(f"the file ends at {begin + done}")
            done += count
            if go_on is not None and not go_on(count):
                return False
        if not self.direct:  # the cache is ours to manage: a second copy in the system's helps nobody
            os.posix_fadvise(self._descriptor, begin, self.layout.stride, os.POSIX_FADV_DONTNEED)
        if checksum(into) != int(self._sums[block]):
            raise CheckpointError(
                f"block file {self.path}: the block at offset {begin} ({self.layout.name(block)}) is not what was "
                "written; pack the checkpoint again"
            )
        return True


def aligned(size: int) -> NDArray[np.uint8]:
    """Zeroed page-aligned memory of ``size`` bytes, which O_DIRECT needs.

    Raises:
        PrismError: there is not enough memory.
    """
    try:
        memory = np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    except OSError as error:
        raise PrismError(f"cannot reserve {size} bytes for the cache ({error}); lower --memory") from None
    prefer_huge_pages(memory.ctypes.data, size)
    return memory

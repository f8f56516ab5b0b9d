"""How much of a memory is left for blocks, on the CPU or on an accelerator, and whether that is enough.

Everything counts: on the CPU the whole process, on an accelerator what lies on it. Knows nothing of what blocks hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import psutil
from transformers import PreTrainedModel

from ..errors import PrismError
from .accelerator import Accelerator
from .block_file import BlockFile, BlockLayout

# Logits, outputs of a layer's pairs and what the allocator keeps, in bytes.
WORKING = 160 << 20
# The same on an accelerator, where products of all of a part's blocks exist at once in two dtypes. Not measured.
DEVICE_WORKING = 512 << 20
# Of the host's memory, what is left to everybody else when blocks are pinned.
_HOST_REST = 1 << 30


def token_bytes(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values, at most: as many heads for keys and values as the family keeps."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = max(width, getattr(config, "qk_head_dim", 0) or 0)
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)


def check_accelerator(layout: BlockLayout, memory: int, accelerator: Accelerator) -> None:
    """Before anything is read: whether the device has that memory, and the host has memory for all blocks.

    Raises:
        PrismError: one of them has not.
    """
    capacity, needed = accelerator.capacity(), layout.blocks * layout.stride
    if memory > capacity:
        raise PrismError(
            f"a memory of {memory / 1e9:.2f} GB is more than {accelerator.device} has, {capacity / 1e9:.2f} GB; "
            "lower --memory"
        )
    available = psutil.virtual_memory().available - _HOST_REST
    if needed > available:
        raise PrismError(
            f"with --device all blocks lie in the host's memory: they take {needed / 1e9:.2f} GB, and "
            f"{max(0, available) / 1e9:.2f} GB can be had; free some, or leave out --device to read blocks from disk"
        )


def room_for_blocks(
    model: PreTrainedModel,
    memory: int,
    context: int,
    required: int,
    files: Sequence[BlockFile],
    shares: Sequence[float],
    accelerator: Accelerator | None = None,
) -> list[int]:
    """Places for each file's blocks in what a memory has left.

    Args:
        model: loaded but for its blocks.
        memory: bytes in all.
        context: tokens whose keys and values are to come.
        required: blocks of one token in one layer, which must fit.
        files: of blocks.
        shares: of what is left, for each file.
        accelerator: whose memory it is; None: the process's.

    Raises:
        PrismError: the memory is too small; the message states the least that works.
    """
    if accelerator is None:
        taken = psutil.Process().memory_info().rss + WORKING
    else:
        taken = accelerator.taken() + DEVICE_WORKING
    free = memory - taken - context * token_bytes(model)
    least = [required * file.layout.stride for file in files]
    missing = max(need / share - free for need, share in zip(least, shares, strict=True))
    if missing > 0:
        raise PrismError(
            f"a memory of {memory / 1e9:.2f} GB is too small: with {context} tokens of context it takes "
            f"{(memory + missing) / 1e9:.2f} GB to hold the {required} sub-experts of one token in one "
            "layer; raise --memory"
        )
    return _places(files, free, shares)


def _places(files: Sequence[BlockFile], free: int, shares: Sequence[float]) -> list[int]:
    """Places of each file's blocks; what a file does not need for all of its blocks goes to the first."""
    later = [
        min(int(share * free) // file.layout.stride, file.layout.blocks)
        for file, share in zip(files[1:], shares[1:], strict=True)
    ]
    left = free - sum(count * file.layout.stride for count, file in zip(later, files[1:], strict=True))
    return [min(left // files[0].layout.stride, files[0].layout.blocks), *later]

"""Expert weights with every neuron's gate, up and down weights as contiguous rows.

Gate and up are rows in the usual layout already; down is transposed expert by expert inside its own
storage (GPT-OSS: the other way round), so packing needs the memory of one expert beside the model. The
module's parameters keep their shapes; they become transposed views. Knows nothing of sub-experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn


class PackedRows(NamedTuple):
    """Rows of one layer's experts.

    Attributes:
        gate_up: ``[E, 2C, H]`` contiguous. Rows of an expert: C of gate, then C of up; interleaved
            (gate 0, up 0, gate 1, ...) where the family stores them so.
        down: ``[E, C, H]`` contiguous, one row a neuron.
    """

    gate_up: Tensor
    down: Tensor


def packed_rows(module: nn.Module) -> PackedRows | None:
    """The rows of a packed module, or None if it is not packed."""
    gate_up: Tensor = module.gate_up_proj.detach()  # type: ignore[operator]
    down: Tensor = module.down_proj.detach()  # type: ignore[operator]
    if module.is_transposed:
        gate_up = gate_up.transpose(1, 2)
    else:
        down = down.transpose(1, 2)
    return PackedRows(gate_up, down) if gate_up.is_contiguous() and down.is_contiguous() else None


@torch.no_grad()
def pack(module: nn.Module) -> None:
    """Pack a module in place; one that is packed stays as it is.

    Tensors on the meta device and weights that are not contiguous to begin with are left alone.
    """
    name = "gate_up_proj" if module.is_transposed else "down_proj"
    weight: nn.Parameter = getattr(module, name)
    if weight.device.type == "meta" or not weight.is_contiguous() or weight.transpose(1, 2).is_contiguous():
        return
    storage = weight.data.view(len(weight), weight.shape[2], weight.shape[1])
    for expert in range(len(weight)):
        storage[expert] = weight.data[expert].t().clone()
    weight.data = storage.transpose(1, 2)


@torch.no_grad()
def unpack(module: nn.Module) -> None:
    """Undo ``pack`` in place; a module that is not packed stays as it is."""
    name = "gate_up_proj" if module.is_transposed else "down_proj"
    weight: nn.Parameter = getattr(module, name)
    rows = weight.data.transpose(1, 2)
    if weight.is_contiguous() or not rows.is_contiguous():
        return
    storage = rows.view(weight.shape)
    for expert in range(len(weight)):
        storage[expert] = rows[expert].t().clone()
    weight.data = storage

"""Weights of a module as the kernels' rows, found once.

Between two layers at one token, caches are cold, and finding the rows anew was a twentieth of a layer's time. Knows
bfloat16 and fp32 weights in CPU memory.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...experts.packing import packed_rows

DTYPES = (torch.bfloat16, torch.float32)


def as_rows(weight: Tensor) -> NDArray[np.generic]:
    """A contiguous weight as NumPy rows ``[R, H]``: fp32, or the bits of bfloat16. No copy."""
    flat = weight.reshape(-1, weight.shape[-1])
    bits: NDArray[np.generic]
    bits = flat.view(torch.int16).numpy().view(np.uint16) if weight.dtype == torch.bfloat16 else flat.numpy()
    return bits


def from_rows(out: NDArray[np.generic], x: Tensor) -> Tensor:
    """What a kernel returned for ``as_rows(x)``, as a tensor of the dtype of ``x``."""
    tensor = torch.from_numpy(out)
    return tensor.view(torch.bfloat16) if x.dtype == torch.bfloat16 else tensor.to(x.dtype)


class Rows(NamedTuple):
    """The rows of a packed module's experts, as ``as_rows`` gives them.

    Attributes:
        layout: addresses and strides of the parameters that they were taken from.
        gate_up: ``[E * 2C, H]``.
        down: ``[E * C, H]``.
        neurons: C.
    """

    layout: tuple[object, ...]
    gate_up: NDArray[np.generic]
    down: NDArray[np.generic]
    neurons: int


_ROWS: WeakKeyDictionary[nn.Module, Rows] = WeakKeyDictionary()
_MATRICES: WeakKeyDictionary[nn.Module, tuple[tuple[object, ...], NDArray[np.generic]]] = WeakKeyDictionary()


def rows_of(module: nn.Module) -> Rows | None:
    """The rows of a packed module in CPU memory; None if it is not packed, or of another dtype."""
    gate_up: Tensor = module.gate_up_proj  # type: ignore[assignment]
    down: Tensor = module.down_proj  # type: ignore[assignment]
    layout = gate_up.data_ptr(), gate_up.stride(), down.data_ptr(), down.stride(), down.dtype
    known = _ROWS.get(module)
    if known is not None and known.layout == layout:
        return known
    forget(module)
    packed = packed_rows(module)
    if packed is None or packed.down.device.type != "cpu" or packed.down.dtype not in DTYPES:
        return None
    rows = Rows(layout, as_rows(packed.gate_up), as_rows(packed.down), packed.down.shape[1])
    _ROWS[module] = rows
    return rows


def matrix_of(module: nn.Module, weight: Tensor) -> NDArray[np.generic]:
    """The rows of a module's only matrix, which is contiguous, in CPU memory and of a known dtype."""
    layout = weight.data_ptr(), weight.shape, weight.dtype
    known = _MATRICES.get(module)
    if known is None or known[0] != layout:
        known = _MATRICES[module] = layout, as_rows(weight.detach())
    return known[1]


def forget(module: nn.Module) -> None:
    """Do not keep the weights of a module, which may have moved."""
    _ROWS.pop(module, None)
    _MATRICES.pop(module, None)

"""The linear layers around the experts, in a decode step on a CPU.

With few tokens a linear layer is a stream of its weights; the compiled kernels of the experts read them
faster than a general matrix product, from rows or, in bfloat16, from panels. Knows nothing of experts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import PrismError
from ..huge_pages import prefer_huge_pages
from .executors.choice import large_products_are_fast
from .executors.panels import as_pairs, as_words, panels_are_fast
from .executors.rows import as_rows, forget, from_rows, matrix_of
from .kernels import multiply_all
from .kernels.dots import COLUMNS
from .kernels.linear_panels import linear_panels

# Most tokens for which the kernel is used, and the fewest weights (`make bench-crossovers`). In fp32 it is 1.1 to 1.4
# times faster at 32 tokens and level at 64, and torch's product of what lies in the caches is faster. In bfloat16 on a
# CPU that multiplies it fast the kernel wins at one token only, where weights come from memory.
FEW = {torch.float32: 32, torch.bfloat16: 1}
SMALLEST = {torch.float32: 1 << 20, torch.bfloat16: 1 << 22}
# Where the CPU has no fast bfloat16 product, the kernel is five times faster as far as was measured; still smaller
# layers cost less than starting the threads.
FEW_EMULATED = 512
SMALLEST_EMULATED = 1 << 16
# In panels: 1.2 to 2.6 times faster than torch at 1 to 32 tokens, about level from 128 on.
SMALLEST_PANELS = 1 << 15


class LinearPanels(NamedTuple):
    """A weight as ``linear_panels`` takes it.

    Attributes:
        weight: uint32 ``[O / 64, I / 2, 64]``.
        bias: fp32 ``[O]``.
    """

    weight: NDArray[np.uint32]
    bias: NDArray[np.float32]

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, *, in_place: bool = False) -> LinearPanels:
        """From bfloat16 ``[O, I]``, O a multiple of 64.

        Args:
            weight: contiguous.
            bias: ``[O]`` or None.
            in_place: overwrite the weight's memory. New memory can lie in huge pages, where a loaded weight is often a
                view of its file.
        """
        outputs, size = weight.shape
        if in_place:
            panels = weight.view(outputs // COLUMNS, size // 2, COLUMNS, 2)
        else:
            panels = torch.empty(outputs // COLUMNS, size // 2, COLUMNS, 2, dtype=weight.dtype)
            prefer_huge_pages(panels.data_ptr(), panels.nbytes)
        for rows, panel in zip(weight.split(COLUMNS), panels, strict=True):  # a panel lies where its rows lay
            panel.copy_(rows.view(COLUMNS, size // 2, 2).transpose(0, 1).contiguous())
        added = torch.zeros(outputs) if bias is None else bias.detach().float()
        return cls(as_words(panels).reshape(-1, size // 2, COLUMNS), added.numpy())

    def rows(self) -> Tensor:
        """The weight again, in new memory."""
        pairs = as_pairs(self.weight).view(*self.weight.shape, 2)
        return pairs.transpose(1, 2).reshape(len(self.bias), -1)


class FastLinear(nn.Linear):
    """``nn.Linear`` with another forward for few tokens; same parameters, names and state.

    Attributes:
        panels: its weight, where it lies in panels (``layout``); every number of tokens runs on them then.
    """

    panels: LinearPanels | None

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b``; sums in fp32, rounded once.

        Raises:
            PrismError: panels cannot run this input.
        """
        if self.panels is not None:
            return _on_panels(self.panels, x)
        tokens = x.numel() // max(1, x.shape[-1])
        if not _suits(self.weight, x, tokens):
            forget(self)
            return super().forward(x)
        flat = x.reshape(tokens, x.shape[-1]).contiguous()
        if self.bias is not None:
            flat = flat.float()  # so that the sum is rounded with the bias in it
        out = from_rows(multiply_all(matrix_of(self, self.weight), as_rows(flat)), flat)
        if self.bias is not None:
            out = (out + self.bias.detach().float()).to(x.dtype)
        return out.view(*x.shape[:-1], out.shape[1])


def _on_panels(panels: LinearPanels, x: Tensor) -> Tensor:
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or (torch.is_grad_enabled() and x.requires_grad):
        raise PrismError(
            "a linear layer in panels runs bfloat16 tokens in CPU memory without gradients, "
            f"not {x.dtype} on {x.device}; load with panels=False"
        )
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out = from_rows(linear_panels(panels.weight, as_rows(flat), panels.bias), flat)
    return out.view(*x.shape[:-1], out.shape[1])


def linear_suits(weight: Tensor) -> bool:
    """Whether this CPU is faster on a weight ``[O, I]`` in panels, for any number of tokens."""
    outputs, size = weight.shape
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and not outputs % COLUMNS
        and not size % 2
        and weight.numel() >= SMALLEST_PANELS
        and panels_are_fast()
    )


def _suits(weight: Tensor, x: Tensor, tokens: int) -> bool:
    if weight.dtype not in FEW:
        return False
    fast = large_products_are_fast(weight.dtype)
    return (
        0 < tokens <= (FEW[weight.dtype] if fast else FEW_EMULATED)
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and weight.numel() >= (SMALLEST[weight.dtype] if fast else SMALLEST_EMULATED)
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def use_fast_linear(model: nn.Module) -> None:
    """Let every plain ``nn.Linear`` of a model use the kernel; parameters stay where they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear
            module.panels = None  # type: ignore[assignment]

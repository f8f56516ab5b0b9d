"""The fastest executor of CPUs with products of bfloat16 pairs, for whole sub-experts, over a layout of its own.

Where weights serve nothing but products with tokens, they may lie as the products take them (``kernels.gated_panels``):
one token reads them at the speed of memory, and 128 take half of the time that ``cpu`` takes. Neurons and rows are not
to be had from panels, so gates that read weights, and rules that skip neurons, keep to ``cpu``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...huge_pages import prefer_huge_pages
from ..kernels.dots import COLUMNS, has_products_of_pairs
from ..kernels.gated_panels import NEURONS, gated_panels, whole_panels
from ..selection import Selection
from .base import EXECUTORS, Executor
from .rows import as_rows, from_rows

PANELS = "panels"
_WASTE = 1.5  # how much larger than its neurons a padded sub-expert may be


class Panels(NamedTuple):
    """One layer's experts of ``silu(gate) * up``, as ``gated_panels`` takes them.

    Attributes:
        gate_up: uint32 ``[E * N * c / 32, H / 2, 64]``; c is C / N rounded up to a multiple of 32.
        down: uint32 ``[E * N, H / 64, c / 2, 64]``.
        n: N.
    """

    gate_up: NDArray[np.uint32]
    down: NDArray[np.uint32]
    n: int

    @classmethod
    def of(cls, gate_up: Tensor, down: Tensor, n: int, *, in_place: bool = False) -> Panels:
        """From bfloat16 ``[E, 2C, H]`` and ``[E, H, C]``; H is a multiple of 64.

        Args:
            gate_up: rows, contiguous where they are overwritten.
            down: the same; or packed (``experts.packing``).
            n: sub-experts of an expert.
            in_place: the weights' own memory is overwritten by the panels, where these need no padding; else they stay
                as they are.
        """
        experts, hidden, neurons = down.shape
        size = neurons // n
        whole = size + -size % NEURONS
        blocks = whole // NEURONS
        rows_shape = n, blocks, hidden // 2, 2, NEURONS, 2
        columns_shape = n, hidden // COLUMNS, whole // 2, COLUMNS, 2
        if in_place and whole == size:
            own = down if down.is_contiguous() else down.transpose(1, 2)
            rows, columns = gate_up.view(experts, *rows_shape), own.view(experts, *columns_shape)
        else:
            rows = torch.empty(experts, *rows_shape, dtype=torch.bfloat16)
            columns = torch.empty(experts, *columns_shape, dtype=torch.bfloat16)
            for fresh in (rows, columns):
                prefer_huge_pages(fresh.data_ptr(), fresh.nbytes)
        for expert in range(experts):  # so that no copy is larger than one of them
            both = nn.functional.pad(gate_up[expert].reshape(2, n, size, hidden), (0, 0, 0, whole - size))
            rows[expert] = both.view(2, n, blocks, NEURONS, hidden // 2, 2).permute(1, 2, 4, 0, 3, 5).contiguous()
            one = nn.functional.pad(down[expert].reshape(hidden, n, size), (0, whole - size))
            paired = one.view(hidden // COLUMNS, COLUMNS, n, whole // 2, 2).permute(2, 0, 3, 1, 4)
            columns[expert] = paired.contiguous()
        return cls(
            as_words(rows).reshape(experts * n * blocks, hidden // 2, COLUMNS),
            as_words(columns).reshape(experts * n, hidden // COLUMNS, whole // 2, COLUMNS),
            n,
        )

    def rows(self, size: int) -> tuple[Tensor, Tensor]:
        """What ``of`` was given, in new memory: bfloat16 ``[E, 2C, H]`` and ``[E, H, C]``, C being ``n * size``."""
        units, wide, half, _ = self.down.shape
        hidden, experts, whole = wide * COLUMNS, units // self.n, 2 * half
        both = as_pairs(self.gate_up).view(experts, self.n, whole // NEURONS, hidden // 2, 2, NEURONS, 2)
        gate_up = both.permute(0, 4, 1, 2, 5, 3, 6).reshape(experts, 2, self.n, whole, hidden)[:, :, :, :size]
        one = as_pairs(self.down).view(experts, self.n, wide, half, COLUMNS, 2)
        down = one.permute(0, 2, 4, 1, 3, 5).reshape(experts, hidden, self.n, whole)[..., :size]
        return gate_up.reshape(experts, -1, hidden), down.reshape(experts, hidden, -1)


def as_words(pairs: Tensor) -> NDArray[np.uint32]:
    """Contiguous bfloat16 as words of two. No copy."""
    words: NDArray[np.uint32] = pairs.view(torch.int16).numpy().view(np.uint32)
    return words


def as_pairs(words: NDArray[np.uint32]) -> Tensor:
    """The bfloat16 of words, one after the other. No copy."""
    return torch.from_numpy(words.view(np.int16)).view(torch.bfloat16)


def panels_suit(dtype: torch.dtype, hidden: int, neurons: int, n: int) -> bool:
    """Whether this CPU is fast on sub-experts of such sizes in panels, and wastes little on their padding.

    Args:
        dtype: of weights and tokens.
        hidden: H.
        neurons: C.
        n: sub-experts of an expert.
    """
    size = neurons // n
    fits = not hidden % COLUMNS and size + -size % NEURONS <= _WASTE * size
    return dtype == torch.bfloat16 and fits and panels_are_fast()


@cache
def panels_are_fast() -> bool:
    """Whether this CPU has products of bfloat16 pairs, and no matrix tiles (AMX), beside which they were not tried."""
    return has_products_of_pairs() and not torch.cpu._is_amx_tile_supported()


@EXECUTORS.register(PANELS)
@dataclass(frozen=True)
class PanelsExecutor(Executor):
    """For modules with an attribute ``panels``; of their other weights nothing is read."""

    runs_full: ClassVar[bool] = True

    def refusal(self, module: nn.Module, x: Tensor) -> str | None:
        """Needs panels, and bfloat16 tokens in CPU memory."""
        if getattr(module, "panels", None) is None:
            return "its weights are not laid out in panels"
        if x.device.type != "cpu" or x.dtype != torch.bfloat16:
            return f"it knows bfloat16 tokens in CPU memory, not {x.dtype} on {x.device}"
        if x.requires_grad and torch.is_grad_enabled():
            return "it has no gradients; run under torch.no_grad()"
        return None

    def run(self, module: nn.Module, x: Tensor, selection: Selection, n: int, computed: Tensor | None = None) -> Tensor:
        """See ``Executor.run``; what a gate computed is computed again."""
        panels: Panels = module.panels  # type: ignore[assignment]
        out = gated_panels(
            panels.gate_up,
            panels.down,
            as_rows(x.contiguous()),
            selection.token.numpy(),
            selection.sub_expert.numpy(),
            selection.weight.float().numpy(),
            panels.n // n,
        )
        return from_rows(out, x)


def run_whole(panels: Panels, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """All of every token's routed experts: what the executor gives for ``whole_experts``, with less around the kernel.

    Args:
        panels: of the layer.
        x: bfloat16 ``[T, H]``.
        index: int32 or int64 ``[T, k]``.
        weights: fp32 ``[T, k]``.
    """
    tokens = as_rows(x.contiguous())
    return from_rows(whole_panels(panels.gate_up, panels.down, tokens, index.numpy(), weights.numpy(), panels.n), x)

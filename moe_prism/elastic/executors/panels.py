"""The fastest executor of CPUs with products of bfloat16 pairs, for whole sub-experts, over a layout of its own.

Where weights serve nothing but products with tokens, they may lie as the products take them (``kernels.gated_panels``):
one token reads them at the speed of memory, and 128 take half of the time that ``cpu`` takes. Neurons and rows are not
to be had from panels, so gates that read weights, and rules that skip neurons, keep to ``cpu``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

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
    def of(cls, gate_up: Tensor, down: Tensor, n: int) -> Panels:
        """From bfloat16 ``[E, 2C, H]`` and ``[E, H, C]``, which stay as they are; H is a multiple of 64."""
        experts, hidden, neurons = down.shape
        size = neurons // n
        more = -size % NEURONS
        blocks, whole = (size + more) // NEURONS, size + more
        rows = torch.empty(experts * n, blocks, hidden // 2, 2, NEURONS, 2, dtype=torch.bfloat16)
        columns = torch.empty(experts * n, hidden // COLUMNS, whole // 2, COLUMNS, 2, dtype=torch.bfloat16)
        for expert in range(experts):  # so that no copy is larger than one of them
            mine = slice(expert * n, (expert + 1) * n)
            both = nn.functional.pad(gate_up[expert].reshape(2, n, size, hidden), (0, 0, 0, more))
            rows[mine] = both.view(2, n, blocks, NEURONS, hidden // 2, 2).permute(1, 2, 4, 0, 3, 5)
            one = nn.functional.pad(down[expert].reshape(hidden, n, size), (0, more))
            columns[mine] = one.view(hidden // COLUMNS, COLUMNS, n, whole // 2, 2).permute(2, 0, 3, 1, 4)
        return cls(
            _words(rows).reshape(experts * n * blocks, hidden // 2, COLUMNS),
            _words(columns).reshape(experts * n, hidden // COLUMNS, whole // 2, COLUMNS),
            n,
        )


def _words(pairs: Tensor) -> NDArray[np.uint32]:
    words: NDArray[np.uint32] = pairs.view(torch.int16).numpy().view(np.uint32)
    return words


def panels_suit(dtype: torch.dtype, hidden: int, neurons: int, n: int) -> bool:
    """Whether this CPU runs sub-experts of such sizes on panels, and wastes little on their padding.

    Args:
        dtype: of weights and tokens.
        hidden: H.
        neurons: C.
        n: sub-experts of an expert.
    """
    size = neurons // n
    fits = not hidden % COLUMNS and size + -size % NEURONS <= _WASTE * size
    return dtype == torch.bfloat16 and fits and has_products_of_pairs()


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

"""What an executor is: a selection and the expert weights become the layer's output.

Executors differ in speed, not in result: each gives the sum of ``reference`` to rounding. One is a frozen
dataclass in one file, registered under a name. It knows nothing of budgets, scores or biases of the output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ...registry import Registry
from ..selection import Selection


class Executor(ABC):
    """Base of all executors."""

    @abstractmethod
    def refusal(self, module: nn.Module, x: Tensor) -> str | None:
        """Why this executor cannot run a module with such inputs; None if it can."""

    @abstractmethod
    def run(self, module: nn.Module, x: Tensor, selection: Selection, n: int, computed: Tensor | None = None) -> Tensor:
        """Weighted sum of the selected sub-experts' outputs, without the experts' output biases.

        Args:
            module: stacked experts, neurons permuted so that sub-expert i of an expert is its i-th run.
            x: ``[T, H]``.
            selection: what to run, sorted by sub-expert.
            n: sub-experts of one expert; 1 selects whole experts.
            computed: activations of the first r neurons of every candidate, ``[T, k, n, r]``, from a gate.

        Returns:
            ``[T, H]`` in the dtype of ``x``; sums are kept in fp32.
        """


EXECUTORS: Registry[Executor] = Registry("executor")


def num_experts(module: nn.Module) -> int:
    """E."""
    return int(module.num_experts)  # type: ignore[arg-type]


_PLAIN: dict[tuple[type, type, bool], bool] = {}


def is_plain(module: nn.Module) -> bool:
    """Whether the layer is ``silu(gate) * up`` without biases, in the usual layout; found out once."""
    key = (type(module), type(getattr(module, "act_fn", None)), bool(module.has_bias))
    if key not in _PLAIN:
        probe = torch.linspace(-9, 9, 8).view(1, 8)
        gate, up = probe.chunk(2, dim=1)
        applied: Tensor = module._apply_gate(probe)  # type: ignore[operator]
        usual = applied.shape == gate.shape and torch.allclose(applied, torch.nn.functional.silu(gate) * up)
        _PLAIN[key] = bool(module.is_concatenated) and not module.has_bias and usual
    return _PLAIN[key]

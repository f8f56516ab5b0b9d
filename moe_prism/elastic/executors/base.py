"""What an executor is: a selection and the expert weights become the layer's output.

Executors differ in speed, not in result: each gives the sum of ``reference`` to rounding. One is a frozen
dataclass in one file, registered under a name. Some can also skip neurons inside the selected sub-experts. It
knows nothing of budgets, scores or biases of the output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ...errors import PrismError
from ...registry import Registry
from ..selection import Selection


@dataclass(frozen=True)
class NeuronRule:
    """Which neurons of its selected sub-experts a token runs: the best by ``weight * |silu(gate)| * scale``.

    They are chosen in blocks of consecutive neurons; the score of a block is the sum of theirs.

    Attributes:
        scale: fp32 ``[E, C]``, how much a neuron matters per unit of its gate activation: for example mean
            |up| times the norm of its down row.
        count: int64 ``[T]``, how many neurons each token runs, over all its sub-experts; or None. Of blocks, as many
            run as lie within it, but at least one.
        threshold: a token runs the blocks whose score exceeds it; or None. Exactly one of the two is given.
        block: neurons of a block, which divide those of a sub-expert; 1 chooses every neuron by itself.

    Raises:
        PrismError: both or none are given, or a count or the block is below 1.
    """

    scale: Tensor
    count: Tensor | None = None
    threshold: float | None = None
    block: int = 1

    def __post_init__(self) -> None:
        if (self.count is None) == (self.threshold is None):
            raise PrismError(f"give count or threshold, got count={self.count}, threshold={self.threshold}")
        if self.count is not None and len(self.count) and int(self.count.min()) < 1:
            raise PrismError(f"count must be 1 or more, got {int(self.count.min())}")
        if self.block < 1:
            raise PrismError(f"block must be 1 or more, got {self.block}")

    @property
    def blocks(self) -> Tensor | None:
        """How many blocks each token runs, int64 ``[T]``; None with a threshold."""
        if self.count is None or self.block == 1:
            return self.count
        return (self.count // self.block).clamp(min=1)

    def check(self, size: int) -> None:
        """Raise PrismError unless blocks divide the ``size`` neurons of a sub-expert."""
        if size % self.block:
            raise PrismError(f"blocks must divide the {size} neurons of a sub-expert, got blocks of {self.block}")

    def of_blocks(self, score: Tensor) -> Tensor:
        """Scores of blocks from those of their neurons: ``[..., c]`` to ``[..., c / block]``."""
        return score if self.block == 1 else score.unflatten(-1, (-1, self.block)).sum(-1)

    def of_neurons(self, runs: Tensor) -> Tensor:
        """Which neurons run, from which blocks do: ``[..., c / block]`` to ``[..., c]``."""
        return runs if self.block == 1 else runs.repeat_interleave(self.block, dim=-1)


class Executor(ABC):
    """Base of all executors.

    Attributes:
        skips_neurons: whether ``run_some`` works; ``skip_refusal`` says for which blocks.
        runs_full: whether it also takes the model's own place at full budget, or leaves that to transformers.
    """

    skips_neurons: ClassVar[bool] = False
    runs_full: ClassVar[bool] = False

    @abstractmethod
    def refusal(self, module: nn.Module, x: Tensor) -> str | None:
        """Why this executor cannot run a module with such inputs; None if it can."""

    def skip_refusal(self, block: int) -> str | None:
        """Why this executor cannot choose neurons in blocks of ``block``; None if it can."""
        return None if self.skips_neurons else "it cannot skip neurons, which this checkpoint does at that budget"

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

    def run_some(self, module: nn.Module, x: Tensor, selection: Selection, n: int, rule: NeuronRule) -> Tensor:
        """Like ``run``, but only the neurons that the rule keeps; for modules that are ``is_plain``."""
        raise NotImplementedError(f"{type(self).__name__} does not skip neurons")


EXECUTORS: Registry[Executor] = Registry("executor")


def num_experts(module: nn.Module) -> int:
    """E."""
    return int(module.num_experts)  # type: ignore[arg-type]

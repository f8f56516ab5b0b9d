"""What finetuning trains: the tensors that lie beside the model, seen as parameters.

The gate's own tensors, the scales by which neurons are chosen, and the compensation. A non-negative tensor is trained
as a factor ``exp(p)`` of each value, any other as a change of ``p`` times the root mean square of its slice (an
expert's rows, a budget's vectors); p starts at zero, so one learning rate suits all. Knows nothing of losses or files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..elastic.budgets import elastic_layers
from ..elastic.compensation import Compensation
from ..elastic.layer import ElasticLayer
from ..elastic.model import COMPENSATION, FINGERPRINT, NEURON_SCALE, PERMUTATION, THRESHOLDS


class _Trained(NamedTuple):
    start: Tensor
    change: Tensor
    put: Callable[[Tensor], None]

    def value(self) -> Tensor:
        if bool((self.start >= 0).all()):
            return self.start * self.change.exp()
        size = self.start.flatten(1).square().mean(dim=1).sqrt()
        return self.start + size.view(-1, *[1] * (self.start.dim() - 1)) * self.change


class Trainable:
    """The tensors of all layers of an elastic model.

    Attributes:
        changes: the parameters by the tensors' names in a checkpoint; their gradients exist.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Of an elastic model whose tensors are what training starts from."""
        self._model = model
        self._trained: dict[str, _Trained] = {}
        for layer, state in elastic_layers(model):
            for name, start, put in _places(state):
                if start.is_floating_point():
                    change = torch.zeros_like(start, requires_grad=True)
                    change.grad = torch.zeros_like(start)  # one that a step does not reach keeps its place in Adam
                    self._trained[f"{layer.name}.{name}"] = _Trained(start, change, put)

    @property
    def changes(self) -> dict[str, Tensor]:
        """See the class."""
        return {name: each.change for name, each in self._trained.items()}

    def put(self) -> None:
        """Let the layers use the present values, with gradients where they are enabled."""
        for each in self._trained.values():
            each.put(each.value())

    def restore(self) -> None:
        """Let the layers use what training started from."""
        for each in self._trained.values():
            each.put(each.start)

    @torch.no_grad()
    def values(self) -> dict[str, Tensor]:
        """The present values by name, fp32 on the CPU."""
        return {name: each.value().cpu() for name, each in self._trained.items()}


def trained_share(tensors: dict[str, Tensor], model: PreTrainedModel) -> tuple[int, float]:
    """How many values of a finetuned checkpoint's ``tensors`` were trained, and over the model's parameters."""
    fixed = (FINGERPRINT, PERMUTATION, THRESHOLDS)
    trained = (v for name, v in tensors.items() if v.is_floating_point() and name.rpartition(".")[2] not in fixed)
    count = sum(value.numel() for value in trained)
    return count, count / model.num_parameters()


def _places(state: ElasticLayer) -> Iterator[tuple[str, Tensor, Callable[[Tensor], None]]]:
    """Name, tensor and how to replace it."""

    def gate(name: str) -> Callable[[Tensor], None]:
        return lambda value: state.replace(name, value)

    def scale(value: Tensor) -> None:
        state.neuron_scale = value

    for name, tensor in state.tensors.items():
        yield name, tensor, gate(name)
    if state.neuron_scale is not None and state.dial.plan is not None:
        yield NEURON_SCALE, state.neuron_scale, scale
    if isinstance(state.compensation, Compensation):
        yield COMPENSATION, state.compensation.vectors, _vectors(state.compensation)


def _vectors(compensation: Compensation) -> Callable[[Tensor], None]:
    def put(value: Tensor) -> None:
        compensation.vectors = value

    return put

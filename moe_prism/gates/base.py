"""What a gate is: fitted offline from a profile, it scores a token's sub-experts at run time.

A gate is one frozen dataclass in one file, registered under a name; its fields are its options and are
stored in the checkpoint. It knows nothing of budgets: turning scores into a selection is the business of
``elastic.selection``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..registry import Registry


class ExpertProfile(NamedTuple):
    """What calibration saw of one expert, its neurons already in the order of the checkpoint.

    Attributes:
        activations: fp32 ``[B, C]``, ``SiLU(x W_gate) * (x W_up)`` of the B profiled tokens.
        routing_weights: fp32 ``[B]``.
        down_norms: fp32 ``[C]``, norm of each neuron's down weights.
        router_row: fp32 ``[H]``, the expert's row of the model's own router.
    """

    activations: Tensor
    routing_weights: Tensor
    down_norms: Tensor
    router_row: Tensor


class LayerShape(NamedTuple):
    """Sizes of one MoE layer: experts E, neurons C of an expert, hidden H, routed k, sub-experts N."""

    num_experts: int
    num_neurons: int
    hidden_size: int
    top_k: int
    num_sub_experts: int


class Scores(NamedTuple):
    """Scores of every candidate, and what was computed on the way.

    Attributes:
        values: ``[T, k, N]``, non-negative, higher means more needed.
        activations: ``[T, k, N, r]`` activations of the first r neurons of every candidate, which an
            executor need not compute again; None if the gate computes none.
    """

    values: Tensor
    activations: Tensor | None = None


class Cost(NamedTuple):
    """Work of one token in one layer: floating-point operations (2 per multiply-add) and weights read."""

    flops: float
    weights: float


class Gate(ABC):
    """Base of all gates; subclasses are frozen dataclasses with at least the field ``weighted``.

    ``weighted`` says whether selection multiplies the scores by the routing weight; ``reads_neurons`` whether
    scoring computes neurons, whose activations then come with the scores; ``reads_weights``
    whether it needs the experts' weights at all; ``reweights`` whether the scores, a softmax over the token's
    candidates, also replace the routing weights of what is selected.
    """

    reads_neurons: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = False
    weighted: bool
    reweights: bool = False

    def leading(self, profile: ExpertProfile, num_sub_experts: int) -> Tensor | None:
        """Neurons that must come first in their sub-expert: int64 ``[N, r]`` positions, or None.

        Positions refer to ``profile``, in which sub-expert n is the run ``n * C / N .. (n + 1) * C / N``.
        The checkpoint's order is then changed accordingly, so that ``score`` reads contiguous rows.
        """
        return None

    @abstractmethod
    def fit(self, profile: ExpertProfile, num_sub_experts: int) -> dict[str, Tensor]:
        """Tensors that ``score`` needs for this expert; stacked over experts by the caller."""

    @abstractmethod
    def score(self, module: nn.Module, tensors: dict[str, Tensor], x: Tensor, index: Tensor, n: int) -> Scores:
        """Score the sub-experts of every token's routed experts.

        Args:
            module: the stacked experts.
            tensors: what ``fit`` gave, stacked: each ``[E, ...]``, on the device of ``x``.
            x: ``[T, H]``.
            index: int64 ``[T, k]``, all in [0, E).
            n: sub-experts of one expert.
        """

    @abstractmethod
    def cost(self, shape: LayerShape, k_active: float) -> Cost:
        """Work per token that scoring adds to a budget, beyond the selected sub-experts themselves."""


GATES: Registry[Gate] = Registry("gate")


def sub_expert_sums(per_neuron: Tensor, num_sub_experts: int) -> Tensor:
    """Sum ``[..., C]`` over contiguous sub-experts: ``[..., N]``."""
    return per_neuron.reshape(*per_neuron.shape[:-1], num_sub_experts, -1).sum(-1)


def rows_of(index: Tensor, num_experts: int) -> list[tuple[int, Tensor, Tensor]]:
    """For every expert that is routed to: (expert, token positions, slot positions)."""
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts).tolist()
    out, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            at = order[start : start + count]
            out.append((expert, at // index.shape[1], at % index.shape[1]))
            start += count
    return out


@dataclass(frozen=True)
class WeightedGate(Gate):
    """Shared option of the gates here.

    Attributes:
        weighted: multiply scores by the routing weight before pooling a token's candidates. The paper
            does not; without it an expert that the router hardly wants competes as an equal.
    """

    weighted: bool = True

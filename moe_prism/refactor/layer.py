"""Refactor one MoE layer: profile, partition, order and gate of each of its experts.

Experts are independent, so they run on all cores; results do not depend on how many. Weights are only
read here. Knows nothing of files.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..elastic.model import NEURON_SCALE
from ..evaluation.environment import usable_cores
from ..experts import ExpertLayer, down_norms
from ..gates import ExpertProfile, Gate
from .capture import LayerInput
from .profile import Profile, profile_expert
from .recipe import Recipe
from .solvers.base import Solver
from .solvers.objective import dropped_mass


class LayerResult(NamedTuple):
    """What refactoring found for a layer.

    Attributes:
        permutation: int32 ``[E, C]``; new position j holds the neuron that was at ``permutation[e, j]``.
        tensors: the gate's and, where neurons can be skipped, ``neuron_scale`` (see ``NeuronRule``): each ``[E, ...]``.
        dropped: fp64 ``[E]``, the partition's objective over the total mass.
        routed_tokens: int64 ``[E]``, calibration tokens of each expert.
        fallbacks: experts that too few tokens reached.
    """

    permutation: Tensor
    tensors: dict[str, Tensor]
    dropped: Tensor
    routed_tokens: Tensor
    fallbacks: list[int]


class _Expert(NamedTuple):
    permutation: Tensor
    tensors: dict[str, Tensor]
    dropped: float
    profile: Profile


def refactor_layer(
    layer: ExpertLayer, number: int, received: LayerInput, recipe: Recipe, solver: Solver, gate: Gate
) -> LayerResult:
    """Partition and order the neurons of every expert of a layer, and fit its gate."""
    norms = down_norms(layer).cpu()
    rows: Tensor = layer.router.weight.detach().float().cpu()  # type: ignore[operator]

    def one(expert: int) -> _Expert:
        seed = (recipe.seed, number, expert)
        profile = profile_expert(layer, received, expert, recipe.tokens_per_expert, recipe.min_tokens_per_expert, seed)
        return _refactor_expert(profile, norms[expert], rows[expert], recipe, solver, gate, seed)

    with ThreadPoolExecutor(usable_cores()) as pool:
        experts = list(pool.map(one, range(layer.num_experts)))
    return LayerResult(
        permutation=torch.stack([e.permutation for e in experts]).int(),
        tensors={name: torch.stack([e.tensors[name] for e in experts]) for name in experts[0].tensors},
        dropped=torch.tensor([e.dropped for e in experts], dtype=torch.float64),
        routed_tokens=torch.tensor([e.profile.routed_tokens for e in experts]),
        fallbacks=[i for i, e in enumerate(experts) if e.profile.is_fallback],
    )


def _refactor_expert(
    profile: Profile, norms: Tensor, row: Tensor, recipe: Recipe, solver: Solver, gate: Gate, seed: tuple[int, ...]
) -> _Expert:
    n = recipe.num_sub_experts
    impact = profile.activations.abs()
    output = impact * profile.routing_weights[:, None] * norms
    if recipe.impact == "output":
        impact = output
    matrix = np.ascontiguousarray(impact.numpy(), dtype=np.float32)
    solver_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    labels = solver.solve(matrix, n, recipe.switched_off, solver_seed)
    order = _order(torch.from_numpy(labels), output.mean(dim=0), n)
    arranged = ExpertProfile(profile.activations[:, order], profile.routing_weights, norms[order], row)
    leading = gate.leading(arranged, n)
    if leading is not None:
        local = _lead(leading, len(order), n)
        order = order[local]
        arranged = arranged._replace(activations=arranged.activations[:, local], down_norms=arranged.down_norms[local])
    total = float(matrix.sum(dtype=np.float64))
    lost = dropped_mass(matrix, labels, n, recipe.switched_off) if n > 1 else 0.0
    tensors = gate.fit(arranged, n)
    if profile.mean_up is not None:
        tensors[NEURON_SCALE] = (profile.mean_up * norms)[order]
    return _Expert(order, tensors, lost / total if total else 0.0, profile)


def _order(labels: Tensor, importance: Tensor, n: int) -> Tensor:
    """Sub-experts by falling importance, and inside each its neurons by falling importance: int64 ``[C]``."""
    mass = torch.zeros(n, dtype=importance.dtype).index_add_(0, labels, importance)
    rank = torch.empty(n, dtype=torch.long)
    rank[torch.argsort(mass, descending=True, stable=True)] = torch.arange(n)
    by_importance = torch.argsort(importance, descending=True, stable=True)
    return by_importance[torch.argsort(rank[labels[by_importance]], stable=True)]


def _lead(leading: Tensor, neurons: int, n: int) -> Tensor:
    """Positions in which each sub-expert starts with its leading neurons: int64 ``[C]``."""
    size = neurons // n
    parts = []
    for i in range(n):
        own = torch.arange(i * size, (i + 1) * size)
        rest = own[~torch.isin(own, leading[i])]
        parts.append(torch.cat([leading[i], rest]))
    return torch.cat(parts)

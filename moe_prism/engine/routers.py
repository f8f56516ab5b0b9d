"""Routers that take the best few of a softmax over linear scores, as the kernel after attention takes them.

Which modules are such routers, and which MLPs nothing but a router and its experts, is found out by running them, so
families need not be known. Knows nothing of budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..elastic.executors.rows import as_rows
from ..elastic.kernels.dots import COLUMNS
from ..elastic.layer import state_of
from ..elastic.linear import LinearPanels
from .layer_kernels import route

_PROBES = 64
# Tokens of the probe whose experts may differ: scores rounded to bfloat16 tie now and then.
_TIES = 6


class Router(NamedTuple):
    """Arguments of ``after_attention``.

    Attributes:
        weight, bias: in panels, padded to whole ones.
        experts: E.
        top_k: experts of a token; 0: no router.
        renormalise: whether their shares add up to one.
        rounded: whether shares are rounded to bfloat16.
    """

    weight: NDArray[np.uint32]
    bias: NDArray[np.float32]
    experts: int = 0
    top_k: int = 0
    renormalise: bool = False
    rounded: bool = False

    @classmethod
    def none(cls, hidden: int) -> Router:
        """In place of one, for MLPs of another kind."""
        return cls(np.empty((0, hidden // 2, COLUMNS), np.uint32), np.empty(0, np.float32))


class Routed(NamedTuple):
    """An MLP that is its experts, run on what its router chooses."""

    router: Router
    experts: nn.Module


@contextmanager
def instead(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    """Another forward for a module, for a while."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@torch.inference_mode()
def routed(mlp: nn.Module) -> Routed | None:
    """None if the module is, or may be, something else."""
    gate, experts = getattr(mlp, "gate", None), getattr(mlp, "experts", None)
    if not isinstance(gate, nn.Module) or not isinstance(experts, nn.Module) or state_of(experts) is None:
        return None
    weight, top_k = getattr(gate, "weight", None), getattr(gate, "top_k", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.dtype != torch.bfloat16 or weight.shape[1] % 2:
        return None
    if weight.device.type != "cpu" or not isinstance(top_k, int):
        return None
    x = torch.randn(_PROBES, weight.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
    found = gate(x)
    if not isinstance(found, tuple) or len(found) != 3 or not _only_experts(mlp, experts, x, found):
        return None
    _, weights, index = found
    padded = nn.functional.pad(weight, (0, 0, 0, -len(weight) % COLUMNS))
    for renormalise in (False, True):
        router = Router(
            *LinearPanels.of(padded, None), len(weight), top_k, renormalise, weights.dtype == torch.bfloat16
        )
        if _alike(router, x, index, weights):
            return Routed(router, experts)
    return None


def _only_experts(mlp: nn.Module, experts: nn.Module, x: Tensor, found: tuple[Tensor, ...]) -> bool:
    """Whether the MLP gives what its experts give for the router's choice; they are not run."""
    _, weights, index = found
    given: list[tuple[Tensor, ...]] = []

    def forward(*arguments: Tensor) -> Tensor:
        given.append(arguments)
        return 3 * arguments[0]

    with instead(experts, forward):
        out = mlp(x[None])
    if len(given) != 1 or len(given[0]) != 3 or not isinstance(out, Tensor) or out.shape != x[None].shape:
        return False
    return all(map(torch.equal, (out[0], *given[0]), (3 * x, x, index, weights)))


def _alike(router: Router, x: Tensor, index: Tensor, weights: Tensor) -> bool:
    own_index, own_weights = map(torch.from_numpy, route(as_rows(x), *router))
    shares, own_shares = (
        torch.zeros(len(x), router.experts).scatter(1, i, w.float())
        for i, w in ((index, weights), (own_index, own_weights))
    )
    same = ((shares > 0) == (own_shares > 0)).all(dim=1)
    return int((~same).sum()) <= _TIES and torch.allclose(shares[same], own_shares[same], rtol=0.05, atol=1e-3)

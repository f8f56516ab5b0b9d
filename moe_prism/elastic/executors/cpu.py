"""The fast executor of CPUs: compiled kernels over packed rows, fp32 arithmetic on weights as stored.

A selected sub-expert is three runs of contiguous rows, so its cost is its bytes. Knows bfloat16 and fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...experts.neurons import is_plain, num_neurons
from ..kernels import add_rows, gated_experts, gated_neurons, multiply_rows
from ..kernels.dots import has_products_of_pairs
from ..kernels.gated import run_starts
from ..kernels.gated_pairs import LENGTH, ROWS, gated_pairs
from ..kernels.neuron_pairs import neuron_pairs
from ..selection import Selection
from .base import EXECUTORS, Executor, NeuronRule
from .bias import add_gate_up_bias
from .rows import DTYPES, Rows, as_rows, forget, from_rows, rows_of

# Tokens that run a neuron, on the mean of all neurons there are, from which products of bfloat16 pairs are faster:
# level at 1, 1.1 times at 2, 2 times from 16 on (`make bench-crossovers`). Where neurons are skipped, 1.0 to 1.2 times
# at 1.5.
PAIRS_FROM = 2
SOME_PAIRS_FROM = 1.5


@numba.njit(cache=True, nogil=True)
def _runs(sub_expert: Any, n: int) -> Any:
    """Where runs of equal values begin, and each run's expert and part."""
    starts = run_starts(sub_expert)
    first = sub_expert[starts[:-1]]
    return starts, first // n, first % n


@dataclass(frozen=True)
class Groups:
    """The sub-experts of a selection and their runs of pairs.

    Attributes:
        token: int64 ``[S]``.
        starts: int64 ``[G + 1]``.
        expert, part: int64 ``[G]``.
    """

    token: NDArray[np.int64]
    starts: NDArray[np.int64]
    expert: NDArray[np.int64]
    part: NDArray[np.int64]

    @classmethod
    def of(cls, selection: Selection, n: int) -> Groups:
        """Group a selection, which is sorted by sub-expert."""
        sub_expert = selection.sub_expert.numpy()
        return cls(selection.token.numpy(), *_runs(sub_expert, n))


@EXECUTORS.register("cpu")
@dataclass(frozen=True)
class CpuExecutor(Executor):
    """Numba kernels on torch's number of threads."""

    skips_neurons: ClassVar[bool] = True
    runs_full: ClassVar[bool] = True

    def refusal(self, module: nn.Module, x: Tensor) -> str | None:
        """Needs packed bfloat16 or fp32 weights in CPU memory."""
        if x.device.type != "cpu":
            forget(module)
            return f"the input is on {x.device}"
        if x.requires_grad and torch.is_grad_enabled():
            return "it has no gradients; run under torch.no_grad()"
        if rows_of(module) is None:
            dtype = module.down_proj.dtype
            return (
                "its weights are not packed" if dtype in DTYPES else f"it knows bfloat16 and fp32 weights, not {dtype}"
            )
        return None

    def run(self, module: nn.Module, x: Tensor, selection: Selection, n: int, computed: Tensor | None = None) -> Tensor:
        """See ``Executor.run``."""
        rows = rows_of(module)
        assert rows is not None  # refusal was asked
        if is_plain(module):
            return _run_plain(module, rows, x, selection, n, computed)
        groups = Groups.of(selection, n)
        skipped = 0 if computed is None else computed.shape[3]
        projected = project(module, rows, x, groups, n, skipped)
        hidden: Tensor = module._apply_gate(add_gate_up_bias(module, projected, selection, n, skipped))  # type: ignore[operator]
        if computed is not None:
            known = computed[selection.token, selection.slot, selection.sub_expert % n]
            hidden = torch.cat([known.float(), hidden], dim=1)
        hidden = hidden * selection.weight[:, None].float()
        out = torch.zeros(x.shape, dtype=torch.float32)
        size = rows.neurons // n
        first = groups.expert * rows.neurons + groups.part * size
        add_rows(rows.down, hidden.numpy(), groups.token, groups.starts, first, size, out.numpy())
        return out.to(x.dtype)

    def run_some(self, module: nn.Module, x: Tensor, selection: Selection, n: int, rule: NeuronRule) -> Tensor:
        """See ``Executor.run_some``; for few tokens, skipped up and down rows are skipped bytes."""
        rows = rows_of(module)
        assert rows is not None  # refusal was asked
        rule.check(rows.neurons // n)
        blocks = np.zeros(len(x), np.int64) if rule.blocks is None else rule.blocks.numpy()
        pairs = selection.token.numpy(), selection.sub_expert.numpy(), selection.weight.float().numpy()
        scale = rule.scale.view(-1, rows.neurons // n).numpy()
        work = rows.gate_up, rows.down, _tokens(x), *pairs, scale, blocks, rule.threshold or 0.0
        enough = SOME_PAIRS_FROM * len(rows.down)
        many = len(selection.weight) * (rows.neurons // n) >= enough and (rule.blocks is None or blocks.sum() >= enough)
        if many and rule.block == 1 and suits_pairs(module, x, n):
            return from_rows(neuron_pairs(*work, rows.neurons, n), x)
        return from_rows(gated_neurons(*work, rule.block, rows.neurons, n), x)


def _tokens(x: Tensor) -> NDArray[np.generic]:
    return as_rows(x.contiguous()) if x.dtype in DTYPES else x.float().numpy()


def suits_pairs(module: nn.Module, x: Tensor, n: int) -> bool:
    """Whether products of bfloat16 pairs can run sub-experts of a module for tokens ``x``."""
    return (
        x.dtype == torch.bfloat16
        and module.down_proj.dtype == torch.bfloat16
        and not x.shape[1] % LENGTH
        and not num_neurons(module) // n % ROWS
        and has_products_of_pairs()
        and is_plain(module)
    )


def _run_plain(
    module: nn.Module, rows: Rows, x: Tensor, selection: Selection, n: int, computed: Tensor | None
) -> Tensor:
    pairs = selection.token.numpy(), selection.sub_expert.numpy(), selection.weight.float().numpy()
    work = rows.gate_up, rows.down, _tokens(x), *pairs
    many = len(selection.weight) * (rows.neurons // n) >= PAIRS_FROM * len(rows.down)
    if many and computed is None and suits_pairs(module, x, n):
        return from_rows(gated_pairs(*work, rows.neurons, n), x)
    known = (
        np.empty((len(selection.weight), 0), np.float32)
        if computed is None
        else computed[selection.token, selection.slot, selection.sub_expert % n].float().numpy()
    )
    return from_rows(gated_experts(*work, known, rows.neurons, n), x)


def project(module: nn.Module, rows: Rows, x: Tensor, groups: Groups, n: int, skipped: int) -> Tensor:
    """Gate and up projections of grouped pairs, laid out for ``_apply_gate``.

    Args:
        module: stacked experts.
        rows: its packed rows.
        x: ``[T, H]``.
        groups: what to run.
        n: sub-experts of one expert.
        skipped: leading neurons of every sub-expert to leave out.

    Returns:
        fp32 ``[S, 2c]``.
    """
    neurons = rows.neurons
    size = neurons // n
    count = size - skipped
    begin = groups.part * size + skipped
    tokens = x.float().contiguous().numpy()
    out = torch.empty(len(groups.token), 2 * count)
    if module.is_concatenated:
        first, parts, run = groups.expert * 2 * neurons + begin, 2, count
    else:  # gate and up rows of a neuron are neighbours
        first, parts, run = groups.expert * 2 * neurons + 2 * begin, 1, 2 * count
    multiply_rows(rows.gate_up, tokens, groups.token, groups.starts, first, parts, neurons, run, out.numpy())
    return out

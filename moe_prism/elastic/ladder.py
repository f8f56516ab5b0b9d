"""The ladder: a budget in bytes, for which every neuron is skipped, run at 4 bits, or run at 8.

The experts' shadow (``experts.shadow``) is read instead of their weights. Gate rows at 4 bits choose the neurons that
run at all; gate and up at 4 bits choose the few whose other 4 bits are worth reading. Work and bytes then differ: cost
counts both. Full budget runs the stored weights. Knows nothing of scores of sub-experts, or of how a plan was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..experts.shadow import LOWER_SHARE, UPPER_SHARE, Planes, Shadow, from_planes
from .executors import CpuExecutor, Executor
from .executors.base import num_experts
from .executors.masked import best_neurons, runs_of
from .kernels import digit_neurons
from .plan import Plan
from .selection import Selection

# Tokens whose activations are in memory at once.
_CHUNK = 2048
STORED = -1


class Rung(NamedTuple):
    """How a budget is spent.

    Attributes:
        scan: sub-experts whose gate rows are read at 4 bits.
        neurons: of these, neurons whose up and down rows are read.
        raised: of these, neurons whose gate, up and down rows are read at 8 bits.
    """

    scan: int
    neurons: int
    raised: int


def rung_within(k_active: int, scan: int, size: int, ratio: float) -> Rung:
    """The rung that the bytes of ``k_active`` sub-experts pay for.

    Args:
        k_active: budget, in sub-experts of bfloat16 weights.
        scan: sub-experts to look at; their gate rows must be payable.
        size: neurons of a sub-expert.
        ratio: neurons to raise per neuron run. Where all neurons run and bytes are left, more are raised.
    """
    left = 3 * k_active * size - scan * size * UPPER_SHARE  # in rows of bfloat16 weights
    neurons = int(left / (2 * UPPER_SHARE + 3 * LOWER_SHARE * ratio) + 1e-9)
    neurons = max(1, min(scan * size, neurons))
    spare = left - 2 * UPPER_SHARE * neurons
    raised = int(spare / (3 * LOWER_SHARE) + 1e-9) if neurons == scan * size else int(ratio * neurons)
    return Rung(scan, neurons, max(0, min(neurons, raised)))


def most_scanned(k_active: int, full_budget: int) -> int:
    """Sub-experts whose gate rows a budget can read and still have half of its bytes for the neurons chosen."""
    return max(1, min(full_budget, int(3 * k_active / UPPER_SHARE / 2)))


class LadderPlan(Plan):
    """The rung of every budget.

    Attributes:
        raised: int64 ``[full + 1]``, neurons raised to 8 bits; ``STORED`` at full budget.
    """

    def __init__(self, rungs: Sequence[Rung], size: int) -> None:
        """``rungs[K - 1]`` for every budget K below full; ``size`` neurons of a sub-expert."""
        full = len(rungs) + 1
        everything = Rung(full, full * size, STORED)
        columns = zip(Rung(0, 0, 0), *rungs, everything, strict=True)
        self.scan, self.neurons, self.raised = (torch.tensor(column) for column in columns)
        self.skips = torch.tensor([False, *(True for _ in rungs), False])
        self.size, self.block = size, 1

    def products(self, k_active: int) -> float:
        """Gate rows looked at, up and down rows that run, gate and up rows of raised neurons once more."""
        scan, neurons, raised = (int(of[k_active]) for of in (self.scan, self.neurons, self.raised))
        return scan * self.size + 2 * neurons + 2 * raised

    def rows_read(self, k_active: int) -> float:
        """Upper planes of what runs, lower planes of what is raised."""
        scan, neurons, raised = (int(of[k_active]) for of in (self.scan, self.neurons, self.raised))
        return (scan * self.size + 2 * neurons) * UPPER_SHARE + 3 * raised * LOWER_SHARE


def run_ladder(
    module: nn.Module,
    shadow: Shadow,
    x: Tensor,
    selection: Selection,
    n: int,
    scale: Tensor,
    neurons: Tensor,
    raised: Tensor,
    executor: Executor,
) -> Tensor:
    """Weighted sum of the outputs of the neurons that run; fp32 sums.

    Where ``executor`` is that of few tokens on a CPU, a compiled kernel reads the rows and digits that run and no
    others. Elsewhere whole experts are computed and what does not run is zeroed: right for measuring, not fast.

    Args:
        module: stacked experts.
        shadow: of these.
        x: ``[T, H]``.
        selection: sub-experts looked at.
        n: sub-experts of one expert.
        scale: fp32 ``[E, C]``, mean |up| times the norm of the down row of a neuron.
        neurons: int64 ``[T]`` on the CPU, neurons that run, the best by ``weight |silu(gate)| scale``.
        raised: int64 ``[T]`` on the CPU, of these, neurons that run at 8 bits, the best by ``weight |silu(gate) up|
            norm``; ``STORED``: the token runs the stored weights.
        executor: for the stored weights; its kind says whether the tokens are few.

    Returns:
        ``[T, H]`` in the dtype of ``x``.
    """
    stored = (raised == STORED).to(x.device)
    out = torch.zeros(x.shape, device=x.device)
    if bool(stored.any()):
        theirs = stored[selection.token]
        out += executor.run(module, x, Selection(*(values[theirs] for values in selection)), n).float()
        selection = Selection(*(values[~theirs] for values in selection))
    if isinstance(executor, CpuExecutor):
        out += _digits(shadow, x, selection, n, scale, neurons, raised)
        return out.to(x.dtype)
    for begin in range(0, len(x), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        mine = (selection.token >= begin) & (selection.token < begin + _CHUNK)
        chosen = Selection(*(values[mine] for values in selection))
        chosen = chosen._replace(token=chosen.token - begin)
        if len(chosen.token):
            counts = neurons[part].to(x.device), raised[part].clamp(min=0).to(x.device)
            out[part] += _some_low(num_experts(module), shadow, x[part].float(), chosen, n, scale, *counts)
    return out.to(x.dtype)


def _digits(
    shadow: Shadow, x: Tensor, selection: Selection, n: int, scale: Tensor, neurons: Tensor, raised: Tensor
) -> Tensor:
    def arrays(planes: Planes) -> tuple[NDArray[np.generic], ...]:
        upper, lower, steps = (plane.flatten(0, 1) for plane in planes)
        return upper.numpy(), lower.numpy(), steps.view(torch.int16).numpy().view(np.uint16)

    size = scale.shape[1] // n
    found = digit_neurons(
        arrays(shadow.gate_up),
        arrays(shadow.down),
        x.detach().float().contiguous().numpy(),
        selection.token.numpy(),
        selection.sub_expert.numpy(),
        selection.weight.detach().float().numpy(),
        scale.view(-1, size).numpy(),
        shadow.norms.flatten().numpy(),
        neurons.clamp(min=1).numpy(),
        raised.clamp(min=0).numpy(),
        scale.shape[1],
        n,
    )
    return torch.from_numpy(found)


def _some_low(
    experts: int, shadow: Shadow, x: Tensor, selection: Selection, n: int, scale: Tensor, count: Tensor, raised: Tensor
) -> Tensor:
    size = scale.shape[1] // n
    token, slot, part = selection.token, selection.slot, selection.sub_expert % n
    slots = int(slot.max()) + 1
    weight = torch.zeros(len(x), slots, n, device=x.device)
    weight[token, slot, part] = selection.weight.float()
    looked_at = torch.zeros(len(x), slots, n, dtype=torch.bool, device=x.device)
    looked_at[token, slot, part] = True
    routed = torch.full((len(x), slots), -1, device=x.device)
    routed[token, slot] = selection.sub_expert // n
    # One row a routed expert of a token, those of an expert together, so that all products are of slices.
    expert, order = routed.flatten().sort(stable=True)
    expert, order = expert[expert >= 0], order[expert >= 0]
    runs = list(runs_of(torch.bincount(expert, minlength=experts).tolist()))
    rows = x[order // slots]
    every = weight.view(-1, n)[order].repeat_interleave(size, dim=1)

    def project(part: slice, bits: int) -> Tensor:
        out = torch.empty(len(order), part.stop - part.start, device=x.device)
        for e, run in runs:
            out[run] = torch.nn.functional.linear(rows[run], _read(shadow.gate_up, e, part, bits, x))
        return out

    def best(score: Tensor, among: Tensor, count: Tensor) -> Tensor:
        by_token = torch.full((len(x) * slots, score.shape[1]), -1.0, device=x.device)
        by_token[order] = score.nan_to_num(torch.inf, torch.inf).masked_fill_(~among, -1.0)
        kept = best_neurons(by_token.view(len(x), -1), count).view(-1, score.shape[1])[order]
        return kept & among

    gate, up = slice(0, size * n), slice(size * n, 2 * size * n)
    low = torch.nn.functional.silu(project(gate, 4)) * every
    among = looked_at.view(-1, n)[order].repeat_interleave(size, dim=1)
    kept = best(low.abs() * scale.to(x.device)[expert], among, count)
    low = low * project(up, 4) * kept
    lifted = best(low.abs() * shadow.norms.to(x.device)[expert], kept, raised)
    high = None
    if bool(lifted.any()):
        high = torch.nn.functional.silu(project(gate, 8)) * every * project(up, 8) * lifted
        low = low * ~lifted
    result = torch.zeros(len(x) * slots, x.shape[1], device=x.device)
    neurons = slice(0, size * n)
    for e, run in runs:
        product = low[run] @ _read(shadow.down, e, neurons, 4, x)
        result[order[run]] = product if high is None else product + high[run] @ _read(shadow.down, e, neurons, 8, x)
    return result.view(len(x), slots, -1).sum(dim=1)


def _read(planes: Planes, expert: int, rows: slice, bits: int, x: Tensor) -> Tensor:
    return from_planes(Planes(*(plane[expert, rows].to(x.device) for plane in planes)), bits)

"""Which executor runs a layer's tokens, if nobody named one.

The crossover was measured with ``make bench-crossovers``. Knows nothing of how executors work.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from ...errors import PrismError
from .base import EXECUTORS, Executor, num_experts

AUTO = "auto"
What = Literal["experts", "parts", "neurons"]  # runs: whole experts, parts of them, or parts but for some neurons

# Experts that tokens run (parts count as parts) over the experts that there are, from which whole large products
# beat work in proportion to the selection on a CPU.
MASKED_FROM: dict[torch.dtype, dict[What, int]] = {
    torch.float32: {"experts": 128, "parts": 320, "neurons": 64},
    torch.bfloat16: {"experts": 64, "parts": 32, "neurons": 32},
}


def choose_executor(name: str, module: nn.Module, x: Tensor, runs: float, what: What = "parts") -> Executor:
    """The named executor, or the fastest that can run this input.

    Args:
        name: a registered name, or "auto".
        module: stacked experts.
        x: ``[T, H]``.
        runs: experts that its tokens run together: T * k at full budget, and parts of experts count as parts.
        what: is to run; for "neurons" it must be able to skip some.

    Raises:
        PrismError: the named executor cannot run this module or input; the message says why.
    """
    some_neurons = what == "neurons"
    if name != AUTO:
        chosen = _executor(name)
        reason = chosen.refusal(module, x)
        if some_neurons and not chosen.skips_neurons:
            reason = "it cannot skip neurons, which this checkpoint does at that budget"
        if reason is not None:
            raise PrismError(f"executor {name!r} cannot run this layer: {reason}; use {AUTO!r} or another")
        return chosen
    for candidate in map(_executor, _preferred(module, x, runs, what)):
        if candidate.refusal(module, x) is None and (candidate.skips_neurons or not some_neurons):
            return candidate
    return _executor("masked" if some_neurons else "reference")


def _preferred(module: nn.Module, x: Tensor, runs: float, what: What) -> tuple[str, ...]:
    if x.device.type != "cpu":
        return ("grouped",)
    many = large_products_are_fast(x.dtype) and runs >= MASKED_FROM.get(x.dtype, {}).get(what, 0) * num_experts(module)
    return ("masked",) if many else ("cpu",)


def large_products_are_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a dtype at full speed: bfloat16 is emulated below AVX-512."""
    return dtype == torch.float32 or "AVX512" in torch.backends.cpu.get_cpu_capability()


@cache
def _executor(name: str) -> Executor:
    return EXECUTORS.create(name)

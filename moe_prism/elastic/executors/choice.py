"""Which executor runs a layer's tokens, if nobody named one.

The crossovers were measured with ``make bench-crossovers``. Knows nothing of how executors work.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from ...errors import PrismError
from .base import EXECUTORS, Executor, num_experts

AUTO = "auto"
# Routed tokens per expert from which whole large products beat work in proportion to the selection on a CPU. At half
# budget the latter is still 1.3 times faster at 256, at three quarters they are level there.
MASKED_FROM = 256
# The same where neurons are skipped: every token has rows of its own then, which are read anew for each.
MASKED_NEURONS_FROM = 16


def choose_executor(name: str, module: nn.Module, x: Tensor, top_k: int, some_neurons: bool = False) -> Executor:
    """The named executor, or the fastest that can run this input.

    Args:
        name: a registered name, or "auto".
        module: stacked experts.
        x: ``[T, H]``.
        top_k: routed experts of a token.
        some_neurons: it must be able to skip neurons.

    Raises:
        PrismError: the named executor cannot run this module or input; the message says why.
    """
    if name != AUTO:
        chosen = _executor(name)
        reason = chosen.refusal(module, x)
        if some_neurons and not chosen.skips_neurons:
            reason = "it cannot skip neurons, which this checkpoint does at that budget"
        if reason is not None:
            raise PrismError(f"executor {name!r} cannot run this layer: {reason}; use {AUTO!r} or another")
        return chosen
    for candidate in map(_executor, _preferred(module, x, top_k, some_neurons)):
        if candidate.refusal(module, x) is None and (candidate.skips_neurons or not some_neurons):
            return candidate
    return _executor("masked" if some_neurons else "reference")


def _preferred(module: nn.Module, x: Tensor, top_k: int, some_neurons: bool) -> tuple[str, ...]:
    if x.device.type != "cpu":
        return ("grouped",)
    enough = MASKED_NEURONS_FROM if some_neurons else MASKED_FROM
    many = len(x) * top_k >= enough * num_experts(module)
    return ("masked",) if many and large_products_are_fast(x.dtype) else ("cpu",)


def large_products_are_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a dtype at full speed: bfloat16 is emulated below AVX-512."""
    return dtype == torch.float32 or "AVX512" in torch.backends.cpu.get_cpu_capability()


@cache
def _executor(name: str) -> Executor:
    return EXECUTORS.create(name)

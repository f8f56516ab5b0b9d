"""Which executor runs a layer's tokens, if nobody named one.

The crossovers were measured with ``make bench-crossovers`` and on the models of ``make bench-schedule``. Knows nothing
of how executors work.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from ...errors import PrismError
from ...experts.neurons import num_neurons
from .base import EXECUTORS, Executor, num_experts
from .cpu import suits_pairs
from .panels import PANELS

AUTO = "auto"
What = Literal["experts", "parts", "neurons"]  # runs: whole experts, parts of them, or parts but for some neurons
# Experts that tokens run (parts count as parts) over the experts that there are, from which whole large products beat
# work in proportion to the selection on a CPU. Of parts of experts the latter is 1.3 times faster at 128 and level at
# 192 to 256; by products of bfloat16 pairs it is faster for any number of tokens.
MASKED_FROM: dict[What, int] = {"experts": 128, "parts": 256, "neurons": 64}
# The same where neurons are skipped and experts do not fit into a core's cache: every token has rows of its own then,
# which are read anew for each. The second number is for AVX-512.
MASKED_LARGE_NEURONS_FROM = (8, 32)
CACHE_BYTES = 1 << 20


def choose_executor(
    name: str, module: nn.Module, x: Tensor, runs: float, what: What = "parts", n: int = 1, block: int = 1
) -> Executor:
    """The named executor, or the fastest that can run this input.

    Args:
        name: a registered name, or "auto".
        module: stacked experts.
        x: ``[T, H]``.
        runs: experts that its tokens run together: T * k at full budget, and parts of experts count as parts.
        what: is to run; for "neurons" it must be able to skip some.
        n: sub-experts of one expert.
        block: neurons that are chosen together.

    Raises:
        PrismError: the named executor, or the only one for weights in panels, cannot run this module or input; the
            message says why.
    """
    some_neurons = what == "neurons"
    if getattr(module, "panels", None) is not None:  # nothing else can read them
        reason = _executor(PANELS).refusal(module, x)
        if name not in (AUTO, PANELS):
            reason = f"executor {name!r} reads rows"
        if reason is not None:
            raise PrismError(f"weights that lie in panels cannot run this: {reason}; load with panels=False")
        return _executor(PANELS)
    if name != AUTO:
        chosen = _executor(name)
        reason = chosen.refusal(module, x)
        if some_neurons:
            reason = chosen.skip_refusal(block) or reason
        if reason is not None:
            raise PrismError(f"executor {name!r} cannot run this layer: {reason}; use {AUTO!r} or another")
        return chosen
    for candidate in map(_executor, _preferred(module, x, runs, what, n, block)):
        if candidate.refusal(module, x) is None and not (some_neurons and candidate.skip_refusal(block)):
            return candidate
    return _executor("masked" if some_neurons else "reference")


def _preferred(module: nn.Module, x: Tensor, runs: float, what: What, n: int, block: int) -> tuple[str, ...]:
    if x.device.type != "cpu":
        return ("grouped",)
    if what != "experts" and block == 1 and suits_pairs(module, x, n):
        return ("cpu",)
    enough = MASKED_FROM[what]
    if what == "neurons" and 3 * num_neurons(module) * x.shape[1] * x.element_size() > CACHE_BYTES:
        enough = MASKED_LARGE_NEURONS_FROM[has_avx512()]
    many = runs >= enough * num_experts(module)
    return ("masked",) if many and large_products_are_fast(x.dtype) else ("cpu",)


def large_products_are_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a dtype at full speed: bfloat16 is emulated below AVX-512."""
    return dtype == torch.float32 or has_avx512()


def has_avx512() -> bool:
    """Whether torch found it here."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


@cache
def _executor(name: str) -> Executor:
    return EXECUTORS.create(name)

"""The usual RMSNorm of a decode step on a CPU: one compiled call instead of eight small operations.

Which modules are the usual one is found out by running them, so families need not be known.
"""

from __future__ import annotations

import copy
from types import MethodType

import torch
from torch import Tensor, nn

from .executors.rows import DTYPES, as_rows, from_rows
from .kernels.norms import norm_rows

_LARGE = 1 << 15  # numbers from which all threads share a call
_USUAL: dict[type, bool] = {}


def use_fast_norms(model: nn.Module) -> None:
    """Let every usual RMSNorm of a model use the kernel; parameters stay where they are."""
    for module in model.modules():
        if is_usual_norm(module):
            module.forward = MethodType(_forward, module)


def is_usual_norm(module: nn.Module) -> bool:
    """Whether a module is ``weight * round(x / sqrt(mean(x^2) + variance_epsilon))``; found out once for its class."""
    weight = getattr(module, "weight", None)
    if type(module) not in _USUAL:
        named = [name for name, _ in module.named_parameters()] == ["weight"]
        epsilon = getattr(module, "variance_epsilon", None)
        if not named or not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(epsilon, float):
            return False
        _USUAL[type(module)] = _behaves(module, epsilon)
    return _USUAL[type(module)]


@torch.no_grad()
def _behaves(module: nn.Module, epsilon: float) -> bool:
    made = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(module)
    size = len(probe.weight)  # type: ignore[arg-type]
    weight = torch.randn(size, generator=made).bfloat16()  # rounded twice, which rounding once would show
    probe.weight = nn.Parameter(weight, False)
    x = torch.randn(64, size, generator=made).bfloat16()
    wide = x.float()
    expected = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).bfloat16()
    return torch.equal(probe(x), expected)


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    known = x.dtype == weight.dtype and x.dtype in DTYPES and x.device.type == weight.device.type == "cpu"
    if not known or not x.numel() or (torch.is_grad_enabled() and x.requires_grad):
        own: Tensor = type(module).forward(module, x)
        return own
    rows = as_rows(x.contiguous()), as_rows(weight.detach())[0], float(module.variance_epsilon)  # type: ignore[arg-type]
    out = norm_rows(*rows) if x.numel() >= _LARGE else norm_rows.alone(*rows)
    return from_rows(out, x).view(x.shape)

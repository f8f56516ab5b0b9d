"""The linear layers around the experts, in a decode step on a CPU.

With few tokens a linear layer is a stream of its weights; the compiled kernel of the experts reads them
faster than a general matrix product. Knows nothing of experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .executors.choice import large_products_are_fast
from .executors.rows import as_rows, forget, from_rows, matrix_of
from .kernels import multiply_all

# Most tokens for which the kernel is used, and the fewest weights (`make bench-crossovers`). In fp32 it is 1.1 to 1.4
# times faster at 32 tokens and level at 64, and torch's product of what lies in the caches is faster. In bfloat16 on a
# CPU that multiplies it fast the kernel wins at one token only, where weights come from memory.
FEW = {torch.float32: 32, torch.bfloat16: 1}
SMALLEST = {torch.float32: 1 << 20, torch.bfloat16: 1 << 22}
# Where the CPU has no fast bfloat16 product, the kernel is five times faster as far as was measured; still smaller
# layers cost less than starting the threads.
FEW_EMULATED = 512
SMALLEST_EMULATED = 1 << 16


class FastLinear(nn.Linear):
    """``nn.Linear`` with another forward for few tokens; same parameters, names and state."""

    def forward(self, x: Tensor) -> Tensor:
        """``x W^T + b``; sums in fp32, rounded once."""
        tokens = x.numel() // max(1, x.shape[-1])
        if not _suits(self.weight, x, tokens):
            forget(self)
            return super().forward(x)
        flat = x.reshape(tokens, x.shape[-1]).contiguous()
        if self.bias is not None:
            flat = flat.float()  # so that the sum is rounded with the bias in it
        out = from_rows(multiply_all(matrix_of(self, self.weight), as_rows(flat)), flat)
        if self.bias is not None:
            out = (out + self.bias.detach().float()).to(x.dtype)
        return out.view(*x.shape[:-1], out.shape[1])


def _suits(weight: Tensor, x: Tensor, tokens: int) -> bool:
    if weight.dtype not in FEW:
        return False
    fast = large_products_are_fast(weight.dtype)
    return (
        0 < tokens <= (FEW[weight.dtype] if fast else FEW_EMULATED)
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype
        and weight.numel() >= (SMALLEST[weight.dtype] if fast else SMALLEST_EMULATED)
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def use_fast_linear(model: nn.Module) -> None:
    """Let every plain ``nn.Linear`` of a model use the kernel; parameters stay where they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FastLinear

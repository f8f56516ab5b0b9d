"""Recognise an experts module by a few of its weights.

transformers hands an experts function the module alone, without its place in the model. A fingerprint
stored beside the gate tensors finds the layer, and at the same time proves that the weights are the
ones the gate was made for.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SAMPLES = 32


def fingerprint(module: nn.Module) -> Tensor:
    """``SAMPLES`` weights spread over ``down_proj``, fp32 (exact for bf16, fp16 and fp32 weights)."""
    weight: Tensor = module.down_proj  # type: ignore[assignment]
    flat = weight.detach().flatten()
    # an odd stride, so that samples fall on different rows and columns
    at = torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).long()
    return flat[at.to(flat.device)].float().cpu()


def matches(module: nn.Module, stored: Tensor) -> bool:
    """Whether ``stored`` was taken from these weights, perhaps in a wider dtype."""
    weight: Tensor = module.down_proj  # type: ignore[assignment]
    return torch.equal(stored.to(weight.dtype).float(), fingerprint(module))

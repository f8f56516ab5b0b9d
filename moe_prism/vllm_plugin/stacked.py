"""vLLM's expert weights, seen as the stacked experts module that gates, selection and executors know.

vLLM and transformers lay them out alike. Knows nothing of vLLM's classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..elastic.executors.panels import Panels


class StackedExperts(nn.Module):
    """``silu(gate) * up`` experts without biases.

    Args:
        gate_up: ``[E, 2C, H]``, rows of gate before rows of up.
        down: ``[E, H, C]``.

    Attributes:
        virtual: the same weights packed for vLLM's kernel, where it runs them.
        panels: the same weights in panels, where those run.
    """

    is_transposed = False
    is_concatenated = True
    has_gate = True
    has_bias = False
    has_post_expert_norm = False
    _is_expert_parallel = False

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.num_experts = len(gate_up)
        self.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        self.down_proj = nn.Parameter(down, requires_grad=False)
        self.act_fn = nn.SiLU()
        self.virtual: Any = None
        self.panels: Panels | None = None

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        applied: Tensor = self.act_fn(gate) * up
        return applied


class GptOssExperts(StackedExperts):
    """GPT-OSS's: clamped activations, biases, gate and up interleaved, and transformers' layout of the weights.

    Args:
        gate_up: ``[E, 2C, H]``, as vLLM has them: gate 0, up 0, gate 1, ...
        down: ``[E, H, C]``.
        gate_up_bias: ``[E, 2C]``.
        down_bias: ``[E, H]``.

    Attributes:
        alpha: of the activation, which vLLM's kernels have fixed as well.
        limit: where it is clamped; the same.
    """

    is_transposed = True
    is_concatenated = False
    has_bias = True
    alpha = 1.702
    limit = 7.0

    def __init__(self, gate_up: Tensor, down: Tensor, gate_up_bias: Tensor, down_bias: Tensor) -> None:
        # rows stay contiguous as packing would have them: vLLM's gate and up rows are, those of down are turned
        super().__init__(gate_up.clone().transpose(1, 2), down.transpose(1, 2).contiguous())
        self.gate_up_proj_bias = nn.Parameter(gate_up_bias.clone(), requires_grad=False)
        self.down_proj_bias = nn.Parameter(down_bias.clone(), requires_grad=False)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate = gate_up[..., ::2].clamp(max=self.limit)
        up = gate_up[..., 1::2].clamp(min=-self.limit, max=self.limit)
        applied: Tensor = (up + 1) * gate * torch.sigmoid(gate * self.alpha)
        return applied


def split_sub_experts(weight: Tensor, n: int, ranks: int, dim: int) -> Tensor:
    """Reorder an expert's neurons so that every tensor-parallel rank gets an equal part of every sub-expert.

    vLLM gives rank r the r-th run of an expert's neurons. All ranks then run the same selection, each on its part.

    Args:
        weight: of one expert; ``dim`` runs over its C neurons.
        n: sub-experts of an expert.
        ranks: how many.
        dim: of the neurons.
    """
    size = weight.shape[dim] // (n * ranks)
    parts = weight.unflatten(dim, (n, ranks, size)).transpose(dim, dim + 1)
    out: Tensor = parts.flatten(dim, dim + 2).contiguous()
    return out


def forget_weights(module: StackedExperts, n: int, leading: int) -> None:
    """Keep the first ``leading`` neurons of every sub-expert for the gate, where nothing else reads the weights.

    Args:
        module: its sub-experts have C / N neurons; afterwards, for the gate, ``leading``.
        n: sub-experts of an expert.
        leading: r; 0 forgets all.
    """
    gate_up = module.gate_up_proj.detach()
    kept = gate_up.unflatten(1, (2, n, -1))[:, :, :, :leading].flatten(1, 3).contiguous()
    module.gate_up_proj = nn.Parameter(kept, requires_grad=False)
    module.down_proj = nn.Parameter(torch.empty(module.down_proj.shape, device="meta"), requires_grad=False)

"""The two costly operations of a training step with hand-written backward passes.

Both exist for the CPU: an autograd graph over the same arithmetic moves several times the memory.
They run on any device and know nothing of the model around them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def swiglu_forward(hidden: Tensor, weight: Tensor) -> Tensor:
    """``w * SiLU(gate) * up`` from hidden ``[n, 2C]`` and weight ``[n]`` -> ``[n, C]``."""
    gate, up = hidden.chunk(2, dim=1)
    return F.silu(gate) * up * weight[:, None]


def swiglu_backward(hidden: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From grad ``[n, C]`` of the unweighted product: grads of hidden and weight, and the weighted product."""
    gate, up = hidden.chunk(2, dim=1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    product = silu * up
    weighted = grad * weight[:, None]
    # d SiLU(g) / dg = s + SiLU(g) (1 - s), with s the sigmoid of g
    slope = sigmoid + silu * (1 - sigmoid)
    return torch.cat([weighted * up * slope, weighted * silu], 1), (grad * product).sum(1), product * weight[:, None]


def cross_entropy_rows(logits: Tensor, target: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Summed loss (nats) of logits ``[n, V]`` and ``scale`` times its gradient ``[n, V]``."""
    log_normaliser = torch.logsumexp(logits, dim=1)
    picked = logits.gather(1, target[:, None]).squeeze(1)
    hit = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
    grad = ((logits - log_normaliser[:, None]).exp() - hit.float()) * scale
    return (log_normaliser - picked).sum(), grad


POINTWISE: dict[str, Callable[..., Any]] = {
    f.__name__: f for f in (swiglu_forward, swiglu_backward, cross_entropy_rows)
}


def compile_pointwise() -> None:
    """Fuse the element-wise parts with ``torch.compile`` (needs a C++ compiler on a CPU)."""
    for name, function in POINTWISE.items():
        POINTWISE[name] = torch.compile(function, dynamic=True)


class SparseExperts(torch.autograd.Function):
    """Routed SwiGLU experts: ``sum_k w[t, k] * down(SiLU(gate(x)) * up(x))``, one expert after the other.

    Shapes: x ``[T, H]``, index ``[T, k]`` (int64), weight ``[T, k]``, gate_up ``[E, 2C, H]``,
    down ``[E, H, C]``; the result is ``[T, H]``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        k = index.shape[1]
        order = torch.argsort(index.reshape(-1), stable=True)
        token = order // k
        counts = torch.bincount(index.reshape(-1), minlength=gate_up.shape[0]).tolist()
        flat_weight = weight.reshape(-1)[order]
        gathered = x[token]
        hidden = x.new_empty(len(order), gate_up.shape[1])
        out = torch.zeros_like(x)
        start = 0
        for e, n in enumerate(counts):
            if n == 0:
                continue
            rows = slice(start, start + n)
            torch.mm(gathered[rows], gate_up[e].t(), out=hidden[rows])
            product = POINTWISE["swiglu_forward"](hidden[rows], flat_weight[rows])
            out.index_add_(0, token[rows], product @ down[e].t())
            start += n
        ctx.save_for_backward(gathered, hidden, order, token, flat_weight, gate_up, down)
        ctx.counts, ctx.shape, ctx.weight_shape = counts, x.shape, weight.shape
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        gathered, hidden, order, token, flat_weight, gate_up, down = ctx.saved_tensors
        grad_out = grads[0].contiguous()
        grad_x = torch.zeros(ctx.shape, dtype=grad_out.dtype, device=grad_out.device)
        grad_gate_up = torch.zeros_like(gate_up)
        grad_down = torch.zeros_like(down)
        grad_weight = torch.empty_like(flat_weight)
        start = 0
        for e, n in enumerate(ctx.counts):
            if n == 0:
                continue
            rows = slice(start, start + n)
            grad_y = grad_out[token[rows]]
            grad_product = grad_y @ down[e]
            grad_hidden, grad_weight[rows], product = POINTWISE["swiglu_backward"](
                hidden[rows], flat_weight[rows], grad_product
            )
            torch.mm(grad_y.t(), product, out=grad_down[e])
            torch.mm(grad_hidden.t(), gathered[rows], out=grad_gate_up[e])
            grad_x.index_add_(0, token[rows], grad_hidden @ gate_up[e])
            start += n
        unsorted = torch.empty_like(grad_weight)
        unsorted[order] = grad_weight
        return grad_x, None, unsorted.view(ctx.weight_shape), grad_gate_up, grad_down


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of ``x @ head.T`` without ever holding all logits.

    Shapes: x ``[T, H]``, head ``[V, H]``, target ``[T]`` (int64); the result is a scalar in nats.
    The gradient is computed on the way forward, chunk by chunk, and scaled on the way back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, target: Tensor, chunk: int = 512) -> Tensor:
        grad_x, grad_head = torch.empty_like(x), torch.zeros_like(head)
        total = x.new_zeros(())
        scale = 1.0 / len(x)
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            loss, grad = POINTWISE["cross_entropy_rows"](x[rows] @ head.t(), target[rows], scale)
            total += loss
            torch.mm(grad, head, out=grad_x[rows])
            grad_head.addmm_(grad.t(), x[rows])
        ctx.save_for_backward(grad_x, grad_head)
        return total * scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_x, grad_head = ctx.saved_tensors
        return grad_x.mul_(grads[0]), grad_head.mul_(grads[0]), None, None

"""The OLMoE architecture for training: the same arithmetic as ``OlmoeForCausalLM``, fewer passes over memory.

All parameters live in one flat fp32 buffer, so that averaging gradients over processes and the
optimiser step are single operations. Export to Hugging Face names is in ``export.py``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ops import LinearCrossEntropy, SparseExperts


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the reference model; the defaults are the bundled one's."""

    vocab_size: int = 4096
    hidden_size: int = 192
    layers: int = 4
    heads: int = 4
    experts: int = 32
    neurons: int = 192
    top_k: int = 4
    norm_topk_prob: bool = False
    max_positions: int = 2048
    rope_theta: float = 10000.0
    eps: float = 1e-5


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Parameter names (as in ``OlmoeForCausalLM``'s stacked layout) and shapes; the head is the embedding."""
    h, c, e = config.hidden_size, config.neurons, config.experts
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, h)}
    for i in range(config.layers):
        layer = f"model.layers.{i}."
        for name in "qkvo":
            out[f"{layer}self_attn.{name}_proj.weight"] = (h, h)
        out[f"{layer}mlp.gate.weight"] = (e, h)
        out[f"{layer}mlp.experts.gate_up_proj"] = (e, 2 * c, h)
        out[f"{layer}mlp.experts.down_proj"] = (e, h, c)
    # vectors last: they are the ones without weight decay
    for i in range(config.layers):
        layer = f"model.layers.{i}."
        for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"):
            out[f"{layer}{name}.weight"] = (h,)
    out["model.norm.weight"] = (h,)
    return out


class ReferenceModel(nn.Module):
    """Decoder-only MoE transformer whose ``forward`` returns the training losses."""

    def __init__(self, config: ModelConfig, seed: int, device: torch.device) -> None:
        super().__init__()
        self.config = config
        self.layout = shapes(config)
        sizes = [math.prod(s) for s in self.layout.values()]
        self.decayed = sum(n for n, s in zip(sizes, self.layout.values(), strict=True) if len(s) > 1)
        self.flat = nn.Parameter(torch.empty(sum(sizes), device=device))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, part in self.named(self.flat).items():
                if part.dim() == 1:
                    part.fill_(1.0)
                    continue
                std = 0.02
                if name.endswith(("o_proj.weight", "down_proj")):
                    std /= math.sqrt(2 * config.layers)
                part.copy_(torch.randn(part.shape, generator=generator) * std)
        head_dim = config.hidden_size // config.heads
        inverse = config.rope_theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
        self.register_buffer("inverse_frequency", inverse.to(device), persistent=False)

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views into a flat tensor (parameters or gradients) under their names."""
        sizes = [math.prod(s) for s in self.layout.values()]
        parts = flat.split(sizes)
        return {n: p.view(s) for (n, s), p in zip(self.layout.items(), parts, strict=True)}

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        """tokens ``[B, S + 1]`` (int64) -> scalars ``loss`` (nats), ``balance``, ``z`` and load ``[L, E]``."""
        config = self.config
        p = self.named(self.flat)
        inputs, targets = tokens[:, :-1], tokens[:, 1:].reshape(-1)
        b, s = inputs.shape
        angles = torch.outer(torch.arange(s, device=tokens.device).float(), self.inverse_frequency)
        angles = torch.cat([angles, angles], dim=1)
        cos, sin = angles.cos(), angles.sin()
        x = F.embedding(inputs, p["model.embed_tokens.weight"]).view(b * s, -1)
        balance = x.new_zeros(())
        z = x.new_zeros(())
        loads = []
        for i in range(config.layers):
            layer = f"model.layers.{i}."
            x = x + self._attention(self._norm(x, p[f"{layer}input_layernorm.weight"]), p, layer, b, s, cos, sin)
            y = self._norm(x, p[f"{layer}post_attention_layernorm.weight"])
            logits = y @ p[f"{layer}mlp.gate.weight"].t()
            probability = logits.softmax(dim=1)
            weight, index = probability.topk(config.top_k, dim=1)
            if config.norm_topk_prob:
                weight = weight / weight.sum(dim=1, keepdim=True)
            load = torch.bincount(index.reshape(-1), minlength=config.experts).float() / len(y)
            balance = balance + config.experts * (load * probability.mean(dim=0)).sum()
            z = z + logits.logsumexp(dim=1).square().mean()
            loads.append(load)
            x = x + SparseExperts.apply(
                y, index, weight, p[f"{layer}mlp.experts.gate_up_proj"], p[f"{layer}mlp.experts.down_proj"]
            )
        x = self._norm(x, p["model.norm.weight"])
        loss = LinearCrossEntropy.apply(x, p["model.embed_tokens.weight"], targets)
        return {
            "loss": loss,
            "balance": balance / config.layers,
            "z": z / config.layers,
            "load": torch.stack(loads).detach(),
        }

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.eps)

    def _attention(
        self, x: Tensor, p: dict[str, Tensor], layer: str, b: int, s: int, cos: Tensor, sin: Tensor
    ) -> Tensor:
        h = x.shape[1]
        prefix = f"{layer}self_attn."
        # q, k and v lie side by side in the flat buffer, so one product serves the three
        qkv = x @ torch.cat([p[f"{prefix}{name}_proj.weight"] for name in "qkv"]).t()
        q, k = normalise_and_rotate(
            qkv,
            p[f"{prefix}q_norm.weight"],
            p[f"{prefix}k_norm.weight"],
            cos,
            sin,
            b,
            self.config.heads,
            self.config.eps,
        )
        v = qkv[:, 2 * h :].view(b, s, self.config.heads, -1)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return y.transpose(1, 2).reshape(b * s, -1) @ p[f"{prefix}o_proj.weight"].t()


def normalise_and_rotate(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, batch: int, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Query and key ``[B, S, heads, D]`` after their norms (over all heads) and rotary embedding."""
    h = q_weight.shape[0]

    def one(part: Tensor, weight: Tensor) -> Tensor:
        y = F.rms_norm(part, (h,), weight, eps).view(batch, -1, heads, h // heads)
        first, second = y.chunk(2, dim=-1)
        return y * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

    return one(qkv[:, :h], q_weight), one(qkv[:, h : 2 * h], k_weight)

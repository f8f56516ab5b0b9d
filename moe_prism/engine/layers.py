"""A step of a model layer by layer, without transformers between the compiled calls.

Which models can be run so is found out by running them: the layers must be built like most families' (norm, attention
with rotated queries and keys, norm, experts), and a step must give bit for bit what transformers gives. Then attention
takes two calls a layer (``layer_kernels``) instead of forty operations, the router with the second of them where it is
one that ``routers`` knows; any other MLP is the model's own module. Knows nothing of budgets.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..elastic.executors.rows import as_rows, from_rows
from ..elastic.layer import elastic_experts
from ..elastic.linear import FastLinear, LinearPanels
from ..elastic.norms import is_usual_norm
from .attention import KeyValueMemory, attend_spans
from .layer_kernels import add_and_norm, after_attention, before_attention
from .routers import Routed, Router, instead, routed

_NO_NORM = np.empty(0, np.uint16)
# Under these names families keep what comes after the second norm.
_MLP = ("mlp", "block_sparse_moe")


class _Norm(NamedTuple):
    weight: NDArray[Any]
    epsilon: float

    @classmethod
    def of(cls, module: object) -> _Norm | None:
        """None if it is not the usual one, in bfloat16."""
        if not isinstance(module, nn.Module) or not is_usual_norm(module):
            return None
        weight: Tensor = module.weight  # type: ignore[assignment]
        if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
            return None
        return cls(as_rows(weight.detach())[0], float(module.variance_epsilon))  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Layer:
    """The parts of a decoder layer, as the kernels take them.

    Attributes:
        mlp: what comes after the second norm.
        routed: the same as a router and experts, where it is nothing else.
        number: of its keys and values.
        first, second: the norms.
        projections: weights and biases of queries, keys and values.
        norms: weights and epsilons of the norms of queries and keys.
        output: of attention.
        scale: of the products.
        window: tokens that a token sees, or None.
    """

    mlp: nn.Module
    routed: Routed | None
    number: int
    first: _Norm
    second: _Norm
    projections: tuple[NDArray[Any], ...]
    norms: tuple[Any, ...]
    output: LinearPanels
    scale: np.float32
    window: int | None

    @classmethod
    def of(cls, layer: nn.Module, memory: KeyValueMemory) -> _Layer | None:
        """None if it is built in another way; that it behaves as it looks is for its user to find out."""
        attention = getattr(layer, "self_attn", None)
        mlp = next((getattr(layer, name) for name in _MLP if hasattr(layer, name)), None)
        first = _Norm.of(getattr(layer, "input_layernorm", None))
        second = _Norm.of(getattr(layer, "post_attention_layernorm", None))
        if not isinstance(attention, nn.Module) or not isinstance(mlp, nn.Module) or first is None or second is None:
            return None
        q, k, v, out = (_panels(getattr(attention, f"{name}_proj", None)) for name in "qkvo")
        if q is None or k is None or v is None or out is None:
            return None
        norms: list[Any] = []
        for name in ("q_norm", "k_norm"):
            norm = _Norm.of(getattr(attention, name)) if hasattr(attention, name) else _Norm(_NO_NORM, 0.0)
            if norm is None:
                return None
            norms += norm
        number: Any = getattr(attention, "layer_idx", None)
        scaling, window = memory.asked.get(number, (None, None))
        clipped = getattr(getattr(attention, "config", None), "clip_qkv", None) is not None  # which few numbers show
        if scaling is None or clipped:
            return None
        only = routed(mlp)
        if only is None and not _gives_tensor(mlp, len(first.weight)):
            return None
        projections = (*q, *k, *v)
        return cls(mlp, only, number, first, second, projections, tuple(norms), out, np.float32(scaling), window)

    def fits(self, hidden: int, angles: int, keys: tuple[int, ...], values: tuple[int, ...]) -> bool:
        """Whether sizes go together: H, those of a position's angles, keys ``[heads, places, D]`` and values."""
        wq, bq, wk, bk, wv, bv = self.projections
        q_norm, _, k_norm, _ = self.norms
        size, value_size = keys[2], values[2]
        heads = len(bq) // size
        return (
            {2 * weight.shape[1] for weight in (wq, wk, wv)} == {hidden, len(self.first.weight)}
            and (len(self.second.weight), len(self.output.bias)) == (hidden, hidden)
            and (len(bq), len(bk), len(bv)) == (heads * size, keys[0] * size, values[0] * value_size)
            and (2 * self.output.weight.shape[1], angles) == (heads * value_size, size)
            and len(q_norm) in (0, size, len(bq))
            and len(k_norm) in (0, size, len(bk))
            and (self.routed is None or 2 * self.routed.router.weight.shape[1] == hidden)
        )


@torch.inference_mode()
def _gives_tensor(mlp: nn.Module, hidden: int) -> bool:
    x = torch.zeros(1, 1, hidden, dtype=torch.bfloat16)
    out = mlp(x)
    return isinstance(out, Tensor) and out.shape == x.shape


def _panels(module: object) -> LinearPanels | None:
    return module.panels if isinstance(module, FastLinear) else None


class Layers:
    """A model's step.

    Attributes:
        memory: keys and values, which transformers has allocated before.
    """

    def __init__(
        self, model: PreTrainedModel, layers: list[_Layer], norm: _Norm, memory: KeyValueMemory, longest: int
    ) -> None:
        base: Any = model.base_model
        self._embed: Any = base.embed_tokens
        self._head: Any = model.get_output_embeddings()
        self._layers, self._norm, self.memory = layers, norm, memory
        self._pools = [tuple(as_rows(p).reshape(p.shape) for p in memory.layers[layer.number]) for layer in layers]
        self._without_experts = False
        self._no_router = Router.none(len(norm.weight))
        like = torch.empty(1, 0, dtype=torch.bfloat16)
        self._angles = [as_rows(table[0]) for table in base.rotary_emb(like, torch.arange(longest)[None])]

    @classmethod
    def of(cls, model: PreTrainedModel, memory: KeyValueMemory, longest: int) -> Layers | None:
        """None if the model is built in another way, or not in panels.

        Args:
            model: in CPU memory.
            memory: of its keys and values.
            longest: request, in tokens.
        """
        base: Any = model.base_model
        found = [_Layer.of(layer, memory) for layer in getattr(base, "layers", ())]
        layers = [layer for layer in found if layer is not None]
        norm, rotary = _Norm.of(getattr(base, "norm", None)), getattr(base, "rotary_emb", None)
        head = isinstance(model.get_output_embeddings(), nn.Linear) and hasattr(base, "embed_tokens")
        if norm is None or not head or memory.own != "sdpa" or not layers or len(layers) < len(found):
            return None
        if not isinstance(rotary, nn.Module) or len(inspect.signature(rotary.forward).parameters) != 2:
            return None
        made = cls(model, layers, norm, memory, longest)
        return made if made._fits() else None

    def _fits(self) -> bool:
        """Whether all sizes are what the kernels, which check none, take them to be."""
        hidden, angles = len(self._norm.weight), self._angles[0].shape[1]
        return all(
            layer.fits(hidden, angles, keys.shape, values.shape)
            for layer, (keys, values) in zip(self._layers, self._pools, strict=True)
        )

    @contextmanager
    def without_experts(self) -> Iterator[None]:
        """What comes after the second norm returns its input, for whoever runs the model."""
        self._without_experts = True
        try:
            with ExitStack() as stack:
                for layer in self._layers:
                    stack.enter_context(instead(layer.mlp, lambda hidden_states, *_, **__: hidden_states))
                yield
        finally:
            self._without_experts = False

    def __call__(self, tokens: Tensor, position: Tensor, last: Tensor) -> Tensor:
        """Logits ``[len(last), vocabulary]``, after ``memory.begin``.

        Args:
            tokens: int64 ``[T]``.
            position: int64 ``[T]``.
            last: int64, tokens of the step whose logits are wanted.
        """
        memory, where, places = self.memory, position.numpy(), self.memory.places.numpy()
        embedded = self._embed(tokens)
        hidden = as_rows(embedded)
        delta = np.zeros_like(hidden)
        seen = {
            window: tuple(map(np.ascontiguousarray, memory.seen(window)))
            for window in {layer.window for layer in self._layers}
        }
        pieces = memory.spans[memory.decoding :]
        for layer, pools in zip(self._layers, self._pools, strict=True):
            hidden, query, attended = before_attention(
                hidden, delta, *layer.first, *layer.projections, *layer.norms, *self._angles, where,
                *pools, places, *seen[layer.window], layer.scale,
            )  # fmt: skip
            if pieces:
                keys, values = memory.layers[layer.number]
                heads = from_rows(query, embedded).view(len(query), -1, keys.shape[2]).transpose(0, 1)
                out = from_rows(attended, embedded).view(len(query), heads.shape[0], -1)
                attend_spans(pieces, heads[None], keys, values, out, float(layer.scale), layer.window)
            router = self._no_router if layer.routed is None else layer.routed.router
            hidden, x, index, weights = after_attention(hidden, attended, *layer.output, *layer.second, *router)
            delta = as_rows(self._mlp(layer, from_rows(x, embedded), index, weights))
        normed = from_rows(add_and_norm(hidden, delta, *self._norm), embedded)
        logits: Tensor = self._head(normed[last])
        return logits

    def _mlp(self, layer: _Layer, x: Tensor, index: NDArray[np.int64], weights: NDArray[np.float32]) -> Tensor:
        if layer.routed is not None and not self._without_experts:
            return elastic_experts(layer.routed.experts, x, torch.from_numpy(index), torch.from_numpy(weights))
        out: Tensor = layer.mlp(x[None])
        return out[0]

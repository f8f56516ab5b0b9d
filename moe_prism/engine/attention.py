"""Attention of a step whose tokens belong to many requests, as an attention function of transformers.

A step is one row of T tokens: first those of requests that decode, one each, then pieces of prompts. Keys and values
of the new tokens are written to the requests' places in the key-value memory; then every request attends to its own
places, where they lie. A family whose attention is not plain (GPT-OSS has sinks) keeps its own function, called once
per request. Knows nothing of requests beyond their places.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedModelError
from .decode import attend

IMPLEMENTATION = "moe_prism_ragged"


class Span(NamedTuple):
    """A request's tokens of a step.

    Attributes:
        first: of the step's tokens, where its own begin.
        length: how many they are.
        start: its first place in the memory.
        before: its tokens whose keys and values are already there.
    """

    first: int
    length: int
    start: int
    before: int


@dataclass
class KeyValueMemory:
    """Keys and values of every layer, ``[heads, tokens, head size]`` each, allocated with the first step.

    Attributes:
        tokens: places.
        own: the model's own attention, "sdpa" or another name.
        places: int64 ``[T]`` of the step's tokens.
        spans: of the step.
        decoding: how many of the spans, the first ones, are of one token.
        layers: keys and values of each, once it has run.
        asked: scale of the products and sliding window that each layer's module asked for.
    """

    tokens: int
    own: str
    places: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    spans: list[Span] = field(default_factory=list)
    decoding: int = 0
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    asked: dict[int, tuple[float | None, int | None]] = field(default_factory=dict, repr=False)
    _single: NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64), repr=False)

    def begin(self, places: Tensor, spans: Sequence[Span]) -> None:
        """Prepare a step; spans of one token come first."""
        self.places, self.spans = places, list(spans)
        self.decoding = next((i for i, span in enumerate(spans) if span.length > 1), len(spans))
        single = np.array([(span.start, span.before + 1) for span in spans[: self.decoding]], dtype=np.int64)
        self._single = single.reshape(-1, 2)

    def seen(self, sliding_window: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First place and number of places that each span of one token attends to, int64 ``[decoding]``."""
        start, length = self._single.T
        if sliding_window is None:
            return start, length
        out = np.maximum(length - sliding_window, 0)
        return start + out, length - out

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``[1, heads, T, head size]`` of the step; returns all keys and values of the layer."""
        if layer not in self.layers:
            self.layers[layer] = tuple(  # type: ignore[assignment]
                new.new_empty(new.shape[1], self.tokens, new.shape[3]) for new in (keys, values)
            )
        pools = self.layers[layer]
        for pool, new in zip(pools, (keys, values), strict=True):
            pool.index_copy_(1, self.places, new[0])
        return pools

    @torch.inference_mode()
    def move(self, source: int, target: int, length: int) -> None:
        """Copy places to lower ones; both may overlap."""
        for pools in self.layers.values():
            for pool in pools:
                pool[:, target : target + length] = pool[:, source : source + length].clone()

    @property
    def bytes(self) -> int:
        """Of all keys and values."""
        return sum(pool.nbytes for pools in self.layers.values() for pool in pools)


def ragged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    key_value_memory: KeyValueMemory | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The registered attention function.

    Args:
        module: the attention layer.
        query: ``[1, query heads, T, head size]``.
        key: ``[1, heads, T, head size]`` of the new tokens only.
        value: the same; its head size may differ.
        attention_mask: not used: what a token may see follows from its request and position.
        scaling: of the products.
        sliding_window: tokens that a token sees, itself included; None: all before it.
        key_value_memory: where keys and values are, passed through the model's forward.
        kwargs: of the family's own function.

    Returns:
        ``[1, T, query heads, value size]``, and None for the weights.
    """
    if key_value_memory is None:
        raise UnsupportedModelError(f"{type(module).__name__} does not pass arguments on to its attention function")
    layer: int = module.layer_idx  # type: ignore[assignment]
    keys, values = key_value_memory.write(layer, key, value)
    key_value_memory.asked[layer] = scaling, sliding_window
    own = None if key_value_memory.own == "sdpa" else _own(module, key_value_memory.own)
    out = query.new_empty(query.shape[2], query.shape[1], value.shape[3])
    spans = key_value_memory.spans
    if own is None and query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16):
        decoding = key_value_memory.decoding
        if decoding:
            scale = query.shape[3] ** -0.5 if scaling is None else scaling
            start, length = key_value_memory.seen(sliding_window)
            out[:decoding] = attend(query[0, :, :decoding].transpose(0, 1), keys, values, start, length, scale)
        spans = spans[decoding:]
    if own is None:
        attend_spans(spans, query, keys, values, out, scaling, sliding_window)
        return out[None], None
    for span in spans:
        q, k, v, seen = _piece(span, query, keys, values, sliding_window)
        mask = None if span.length == 1 else _mask(span, seen, sliding_window, query.device)
        added = None if mask is None else torch.where(mask, 0.0, torch.finfo(q.dtype).min).to(q.dtype)[None, None]
        part = own(module, q, k, v, added, scaling=scaling, sliding_window=sliding_window, **kwargs)[0][0]
        out[span.first : span.first + span.length] = part
    return out[None], None


def attend_spans(
    spans: Sequence[Span],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    scaling: float | None,
    sliding_window: int | None,
) -> None:
    """Requests' own places one by one, with torch's attention.

    Args:
        spans: of a step.
        query: ``[1, query heads, T, D]``.
        keys: ``[heads, places, D]``, those of the step among them.
        values: ``[heads, places, V]``.
        out: ``[T, query heads, V]``, where the spans' tokens are written.
        scaling: of the products; None: ``D ** -0.5``.
        sliding_window: see ``ragged_attention``.
    """
    for span in spans:
        q, k, v, seen = _piece(span, query, keys, values, sliding_window)
        whole = seen == span.before == 0 and sliding_window is None
        mask = None if span.length == 1 or whole else _mask(span, seen, sliding_window, query.device)
        grouped = q.shape[1] != k.shape[1]
        got = scaled_dot_product_attention(
            q, k, v, mask, scale=scaling, is_causal=mask is None and span.length > 1, enable_gqa=grouped
        )
        out[span.first : span.first + span.length] = got[0].transpose(0, 1)


def _piece(
    span: Span, query: Tensor, keys: Tensor, values: Tensor, sliding_window: int | None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """A span's queries, keys and values, and how many of its tokens it does not see."""
    end = span.before + span.length
    seen = 0 if sliding_window is None else max(0, span.before + 1 - sliding_window)
    places = slice(span.start + seen, span.start + end)
    return query[:, :, span.first : span.first + span.length], keys[None, :, places], values[None, :, places], seen


def _mask(span: Span, seen: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """bool ``[length, before + length - seen]``: what each new token may see."""
    position = torch.arange(span.before, span.before + span.length, device=device)[:, None]
    other = torch.arange(seen, span.before + span.length, device=device)
    visible = other <= position
    return visible if sliding_window is None else visible & (other > position - sliding_window)


def _own(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The family's own attention function."""
    eager: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    found: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
    return found


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, ragged_attention)

"""Forward passes of a model over tokens of many requests, each token with its own budget.

The tokens are one row without padding, so the experts and all other layers see no token that nobody asked for. At full
budget for everybody the model takes its own path. Where the model allows it, transformers is left out of steps
(``layers``). Knows requests only as spans; nothing of policies or sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ..elastic import dial_of
from ..errors import PrismError, UnsupportedModelError
from .attention import IMPLEMENTATION, KeyValueMemory, Span
from .layers import Layers

# Their tables of angles depend on the longest request of a step.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
PROBE = 16  # places that comparing compiled steps with transformers' needs
_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


class Runner:
    """A model and its key-value memory.

    Attributes:
        model: elastic, in eval mode.
        memory: keys and values of ``tokens`` places.
        vocabulary: size of it.
        max_context: most tokens of prompt and output of one request.
    """

    def __init__(self, model: PreTrainedModel, tokens: int) -> None:
        """Allocates the memory by running one token.

        Raises:
            PrismError: the model is not elastic.
            UnsupportedModelError: its attention cannot be run in ragged steps.
        """
        self.model = model
        self.dial = dial_of(model)
        config: Any = model.config.get_text_config()
        self.vocabulary: int = config.vocab_size
        self.max_context = _max_context(config)
        unknown = set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS
        if unknown:
            raise UnsupportedModelError(
                f"{config.model_type} has layers of type {', '.join(sorted(unknown))}; the engine runs "
                f"{' and '.join(sorted(_KNOWN_LAYERS))} only: use transformers' generate"
            )
        self.memory = KeyValueMemory(tokens, config._attn_implementation or "eager")
        self._layers: Layers | None = None
        self.forward(np.zeros(1, np.int64), [Span(0, 1, 0, 0)], [self.dial.full_budget], [0])
        if len(self.memory.layers) != config.num_hidden_layers:
            raise UnsupportedModelError(
                f"{config.model_type}: {len(self.memory.layers)} of {config.num_hidden_layers} layers use the "
                "attention interface of transformers, the engine needs all; use transformers' generate"
            )
        layers = Layers.of(model, self.memory, min(self.max_context, tokens))
        if layers is not None and self._agree(layers):
            self._layers = layers

    @property
    def compiled(self) -> bool:
        """Whether steps run layer by layer in compiled calls (``Layers``)."""
        return self._layers is not None

    @torch.inference_mode()
    def forward(
        self,
        tokens: NDArray[np.int64],
        spans: Sequence[Span],
        budgets: Sequence[int],
        last: Sequence[int],
        floors: Sequence[int] = (),
        cap: int | None = None,
    ) -> Tensor:
        """Run a step.

        Args:
            tokens: int64 ``[T]``, the spans' tokens one after the other.
            spans: of the requests that take part.
            budgets: one per span.
            last: of the step's tokens, those whose logits are wanted.
            floors: one per span, where there is a cap.
            cap: different sub-experts that a layer may load, floors first.

        Returns:
            Logits, fp32 ``[len(last), vocabulary]``.
        """
        device = self.model.device
        counts = np.array([span.length for span in spans])
        within = np.arange(len(tokens)) - np.repeat([span.first for span in spans], counts)
        position = within + np.repeat([span.before for span in spans], counts)
        place = position + np.repeat([span.start for span in spans], counts)
        self.memory.begin(torch.from_numpy(place).to(device), spans)
        if cap is not None:
            each, sure = (torch.from_numpy(np.repeat(np.array(k), counts)) for k in (budgets, floors))
            self.dial.fill(each, floors=sure, cap=cap)
        elif min(budgets) == self.dial.full_budget:
            self.dial.fill(None)
        else:
            self.dial.fill(torch.from_numpy(np.repeat(np.array(budgets), counts)))
        wanted = torch.tensor(last, dtype=torch.int64, device=device)
        try:
            if self._layers is not None:
                return self._layers(torch.from_numpy(tokens), torch.from_numpy(position), wanted).float()
            with self._attention():
                out = self.model(
                    input_ids=torch.from_numpy(tokens)[None].to(device),
                    position_ids=torch.from_numpy(position)[None].to(device),
                    use_cache=False,
                    logits_to_keep=wanted,
                    key_value_memory=self.memory,
                )
        finally:
            self.dial.fill(None)
        logits: Tensor = out.logits[0].float()
        return logits

    def _agree(self, layers: Layers) -> bool:
        """Whether compiled steps give what transformers gives, bit for bit, between the experts: running those would
        take many of a long prompt, which may have to be read from a disk.
        """
        if self.memory.tokens < PROBE:
            return False
        tokens = np.arange(12) * 7 % self.vocabulary
        steps = [
            (tokens, [Span(0, 9, 0, 0), Span(9, 3, 10, 0)]),
            (tokens[:2], [Span(0, 1, 0, 9), Span(1, 1, 10, 3)]),
        ]
        found = []
        try:
            with layers.without_experts():
                for self._layers in (None, layers):
                    for given, spans in steps:
                        budgets = [self.dial.full_budget] * len(spans)
                        found.append(self.forward(given, spans, budgets, range(len(given))))
        finally:
            self._layers = None
        return torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])

    @contextmanager
    def _attention(self) -> Iterator[None]:
        """Our attention for one forward: outside of steps, ``generate`` works as before."""
        config: Any = self.model.config
        before = config._attn_implementation
        config._attn_implementation = IMPLEMENTATION
        try:
            yield
        finally:
            config._attn_implementation = before


def _max_context(config: Any) -> int:
    longest: int = config.max_position_embeddings
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in _BATCH_DEPENDENT_ROPE:
            original = parameters.get("original_max_position_embeddings", longest)
            longest = min(longest, int(original))
    return longest


def require_room(tokens: int, max_context: int, name: str) -> None:
    """Raise PrismError for a request that is longer than the model's context."""
    if tokens > max_context:
        raise PrismError(
            f"request {name}: prompt and max_tokens are {tokens} tokens, the model's context is {max_context}; "
            "shorten the prompt or lower max_tokens"
        )

"""The next token of every request from its logits. Each request draws from a generator of its own, so what it gets does
not depend on its neighbours in the batch. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import TopPLogitsWarper

from .requests import Sampling


class Chosen(NamedTuple):
    """A token, and what was asked for of its distribution; ``token`` is None where the logits are not finite."""

    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws the tokens of one request."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator: torch.Generator | None = None
        self._top_p: TopPLogitsWarper | None = None
        if sampling.temperature > 0:
            self._generator = torch.Generator()
            if sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(sampling.seed)
            if sampling.top_p < 1:
                self._top_p = TopPLogitsWarper(sampling.top_p)

    @property
    def greedy(self) -> bool:
        """Whether it takes the most likely token."""
        return self._generator is None

    def draw(self, logits: Tensor) -> int:
        """A token from fp32 ``[V]``; in double, and with the largest at 0: no temperature above 0 overflows."""
        scores = (logits.double() - logits.max())[None] / self.sampling.temperature
        if self._top_p is not None:
            scores = self._top_p(None, scores)
        return int(torch.multinomial(scores.softmax(-1).cpu(), 1, generator=self._generator))


def choose(samplers: Sequence[Sampler], logits: Tensor) -> list[Chosen]:
    """One token each from fp32 ``[R, V]``."""
    best = logits.max(dim=-1)
    finite = best.values.isfinite().tolist()
    chosen = []
    for row, (sampler, likeliest) in enumerate(zip(samplers, best.indices.tolist(), strict=True)):
        if not finite[row]:
            chosen.append(Chosen(None))
            continue
        token = likeliest if sampler.greedy else sampler.draw(logits[row])
        count = sampler.sampling.logprobs
        if count is None:
            chosen.append(Chosen(token))
            continue
        logprobs = logits[row].log_softmax(-1)
        top = logprobs.topk(count)
        pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        chosen.append(Chosen(token, float(logprobs[token]), pairs))
    return chosen

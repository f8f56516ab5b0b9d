"""What all families have in common: an elastic checkpoint makes its MoE layers elastic, a stock one changes nothing.

Knows nothing of any family but how checkpoints name experts' weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from ..experts import make_elastic
from ..setup import Setup, neuron_ranks, setup_of
from ..stacked import split_sub_experts

_EXPERT = re.compile(r"\.experts\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
_DOWN = ("down_proj", "w2")


class ElasticModel(nn.Module):
    """Comes before a class of vLLM's among the bases."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._setup: Setup | None = setup_of(vllm_config)
        self._ranks: int = neuron_ranks(vllm_config.parallel_config)
        if self._setup is not None:
            make_elastic(self, self._setup)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """vLLM's, with the neurons of sub-experts spread over the ranks that share experts."""
        if self._setup is not None and self._ranks > 1:
            weights = _spread(weights, self._setup.elastic.num_sub_experts, self._ranks)
        return super().load_weights(weights)  # type: ignore[misc]


def _spread(weights: Iterable[tuple[str, Tensor]], n: int, ranks: int) -> Iterator[tuple[str, Tensor]]:
    for name, weight in weights:
        found = _EXPERT.search(name)
        yield name, weight if found is None else split_sub_experts(weight, n, ranks, int(found[1] in _DOWN))

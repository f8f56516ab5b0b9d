"""Run calibration tokens through an elastic model and look at what every expert layer receives and puts out.

Knows nothing of what is done with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..elastic.budgets import elastic_layers
from .capture import TOKENS_PER_BATCH

Watcher = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Called with a layer's hidden states ``[T, H]``, routed experts and routing weights ``[T, k]``, and its output."""


@torch.no_grad()
def watch_layers(
    model: PreTrainedModel,
    windows: Tensor,
    watchers: Mapping[str, Watcher],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """One forward pass at the budget in force, batch by batch.

    Args:
        model: elastic.
        windows: int64 ``[n, context]`` tokens.
        watchers: by layer name, one for every elastic layer.
        progress: called with (batches done, batches in all).
    """
    handles = [
        layer.module.register_forward_hook(_hook(watchers[layer.name]), with_kwargs=True)
        for layer, _ in elastic_layers(model)
    ]
    body = getattr(model, "base_model", model)
    batches = windows.split(max(1, TOKENS_PER_BATCH // windows.shape[1]))
    try:
        for number, batch in enumerate(batches):
            body(input_ids=batch.to(model.device), use_cache=False)
            if progress:
                progress(number + 1, len(batches))
    finally:
        for handle in handles:
            handle.remove()


def _hook(watcher: Watcher) -> Callable[[nn.Module, Sequence[Any], dict[str, Any], Tensor], None]:
    def hook(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> None:
        x, index, weights = (*args, *kwargs.values())[:3]
        watcher(x, index, weights, out)

    return hook

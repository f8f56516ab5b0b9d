"""Run calibration tokens through the model once and keep what every expert layer received.

Hidden states, routed experts and routing weights go to disk, batch by batch, so that memory stays at the
model plus one batch, and a killed run continues at the first missing batch. On disk that is
``tokens * layers * (2 H + 6 k)`` bytes for a 16-bit model. Knows nothing of neurons.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import PrismError
from ..experts import ExpertLayer

TOKENS_PER_BATCH = 2048


class LayerInput(NamedTuple):
    """What one expert layer received for T calibration tokens.

    Attributes:
        x: ``[T, H]`` in the model's dtype.
        experts: int64 ``[T, k]``, routed experts.
        weight: fp32 ``[T, k]``.
    """

    x: Tensor
    experts: Tensor
    weight: Tensor


def capture_bytes(layers: list[ExpertLayer], tokens: int, itemsize: int) -> int:
    """Disk that ``capture`` needs."""
    return sum(tokens * (layer.hidden_size * itemsize + layer.top_k * 6) for layer in layers)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write under a temporary name and rename, so that a file that exists is whole."""
    temporary = path.with_suffix(".tmp")
    save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
    os.replace(temporary, path)


@torch.no_grad()
def capture(
    model: nn.Module,
    layers: list[ExpertLayer],
    windows: Tensor,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write ``folder/batch-NNNN.safetensors`` for every batch that is not there yet.

    Args:
        model: any causal language model, in eval mode.
        layers: its expert layers.
        windows: int64 ``[n, context]``.
        folder: is created.
        progress: called with (batches done, batches in all).

    Raises:
        PrismError: a hidden state is not finite; the message names the layer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    per_batch = max(1, TOKENS_PER_BATCH // windows.shape[1])
    batches = windows.split(per_batch)
    received: dict[str, Tensor] = {}

    def hook(layer: ExpertLayer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, index, weight = (*args, *kwargs.values())[:3]
            if not torch.isfinite(x).all():
                raise PrismError(f"{layer.name}: calibration gave hidden states that are not finite (NaN or infinite)")
            received[f"{layer.name}.x"] = x.detach().reshape(-1, layer.hidden_size).cpu()
            received[f"{layer.name}.experts"] = index.detach().to(torch.int16).cpu()
            received[f"{layer.name}.weight"] = weight.detach().float().cpu()

        return keep

    handles = [layer.module.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer in layers]
    device = next(model.parameters()).device
    body = getattr(model, "base_model", model)  # without the head: its logits would be the largest tensor of all
    try:
        for number, batch in enumerate(batches):
            path = folder / f"batch-{number:04d}.safetensors"
            if not path.exists():
                received.clear()
                body(input_ids=batch.to(device), use_cache=False)
                save_tensors(path, received)
            if progress:
                progress(number + 1, len(batches))
    finally:
        for handle in handles:
            handle.remove()


def read_layer(folder: Path, layer: ExpertLayer) -> LayerInput:
    """All captured tokens of one layer; only this layer's tensors are read."""
    parts: dict[str, list[Tensor]] = {"x": [], "experts": [], "weight": []}
    for path in sorted(folder.glob("batch-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name, values in parts.items():
                values.append(file.get_tensor(f"{layer.name}.{name}"))
    return LayerInput(torch.cat(parts["x"]), torch.cat(parts["experts"]).long(), torch.cat(parts["weight"]))

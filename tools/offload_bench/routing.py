"""Routing of a large model made from the routing of the bundled one, which is small but really trained.

Every layer of the large model is given two streams of text of one layer of the small one, each for half of its
experts: what a stream routes to, with which weights, and what the next layer's router says of the input of the layer in
front, which is what read-ahead guesses from. Sub-experts have the importances that a refactoring of the small model
measured. So locality in time, skew among experts and sub-experts, and the quality of guesses are those of a trained
model; sizes are those of the large one. Knows nothing of files of blocks.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_prism.checkpoint.schema import TENSORS_FILE
from moe_prism.evaluation.text import read_text
from moe_prism.experts import find_expert_layers


class Routing(NamedTuple):
    """What every layer routes its tokens to.

    Attributes:
        index: int64 ``[L, T, k]`` experts, the largest weight first.
        weight: fp32 ``[L, T, k]`` routing weights.
        guessed_index, guessed_weight: what the input of the layer in front says; of layer 0 nothing is guessed.
        importance: fp32 ``[L, E, N]``, scores of sub-experts.
    """

    index: NDArray[np.int64]
    weight: NDArray[np.float32]
    guessed_index: NDArray[np.int64]
    guessed_weight: NDArray[np.float32]
    importance: NDArray[np.float32]

    def save(self, path: Path) -> None:
        """Write all arrays to one file."""
        np.savez(path, **self._asdict())

    @classmethod
    def load(cls, path: str | Path) -> Routing:
        """Read what ``save`` wrote."""
        with np.load(path) as arrays:
            return cls(**arrays)


@torch.no_grad()
def record(model: Path, checkpoint: Path, text: Path, layers: int, tokens: int, seed: int) -> Routing:
    """Routing with the locality of a trained model.

    Args:
        model: the small model, of three layers or more; every layer of the large one has twice its experts and top-k.
        checkpoint: the same model refactored, with a static gate.
        text: what it reads.
        layers: L of the large model.
        tokens: T.
        seed: of the numbering of the experts in every layer.
    """
    rng = np.random.default_rng(seed)
    small = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found = find_expert_layers(small)
    depth, experts = len(found), found[0].num_experts
    pairs = max(1, -(-(layers - 2) // (depth - 2)))
    ids = AutoTokenizer.from_pretrained(model)(read_text(text)[: 16 * 2 * pairs * tokens]).input_ids
    rows = torch.tensor(ids[: 2 * pairs * tokens]).view(2 * pairs, tokens)
    inputs: list[Tensor] = []
    hooks = [layer.router.register_forward_hook(lambda _, args, out: inputs.append(args[0])) for layer in found]
    for row in rows:
        small(row[None])
    for hook in hooks:
        hook.remove()
    seen = [[inputs[stream * depth + layer] for layer in range(depth)] for stream in range(2 * pairs)]
    tensors = load_file(checkpoint / TENSORS_FILE)
    parts: list[tuple[NDArray[np.generic], ...]] = []
    for layer in range(layers):
        # The first two layers are the first two: the input of the first says hardly anything of the second. The others
        # take turns at the rest, each with the one in front of it to guess from.
        mine, pair = (layer, 0) if layer < 2 else (2 + (layer - 2) % (depth - 2), (layer - 2) // (depth - 2))
        streams, router = (2 * pair, 2 * pair + 1), found[mine].router
        number = rng.permutation(2 * experts)
        routed = _both(router, [seen[s][mine] for s in streams], number)
        guessed = _both(router, [seen[s][max(0, mine - 1)] for s in streams], number)
        scores = tensors[f"{found[mine].name}.importance"].numpy()
        importance = np.empty((2 * experts, scores.shape[1]), np.float32)
        importance[number] = np.concatenate([scores, scores])
        parts.append((*routed, *guessed, importance))
    return Routing(*(np.stack(arrays) for arrays in zip(*parts, strict=True)))


def _both(
    router: nn.Module, inputs: list[Tensor], number: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Two streams side by side: experts under their new numbers and weights, the largest first."""
    routed = [router(x) for x in inputs]
    half = len(number) // 2
    index = torch.cat([routed[0][2], routed[1][2] + half], dim=1).numpy()
    weight = torch.cat([routed[0][1], routed[1][1]], dim=1).float().numpy() / 2
    order = np.argsort(-weight, axis=1, kind="stable")
    return number[np.take_along_axis(index, order, 1)], np.take_along_axis(weight, order, 1)


def uniform(like: Routing, seed: int) -> Routing:
    """The worst case: every token goes to experts drawn anew, no guess knows them; weights and scores stay."""
    rng = np.random.default_rng(seed)
    layers, tokens, k = like.index.shape
    drawn = [rng.random((layers, tokens, like.importance.shape[1])).argpartition(k, axis=2)[:, :, :k] for _ in "12"]
    return like._replace(index=drawn[0], guessed_index=drawn[1])

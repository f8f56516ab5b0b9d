"""Calibration tokens: from a file, a folder, a data set of the hub, or from the model itself.

Knows nothing of what is done with the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import PrismError
from ..evaluation.sampling import sample_windows
from ..evaluation.text import read_text, text_name, tokenize

SELF_SAMPLED = "sampled from the model"
# A text is cut into at most so many parts; the seed says which one is used.
PARTS = 8


class CalibrationText(NamedTuple):
    """Windows of token ids and where they come from.

    Attributes:
        windows: int64 ``[n, context]``.
        name: file name, data set name, or that the model wrote it.
    """

    windows: Tensor
    name: str


def load_calibration(
    source: str | None,
    tokenizer: Any,
    model: Any,
    tokens: int,
    context: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationText:
    """At most ``tokens`` tokens in windows of ``context``.

    Args:
        source: a file or folder; else ``name[:config[:split]]`` of a data set on the hub with a column
            ``text``; None: the model writes it (temperature 1, from its beginning-of-text token).
        tokenizer: of the model; only needed for text.
        model: a causal language model; only needed without a source.
        tokens: the limit.
        context: tokens of a window.
        seed: of the sampling; or which part of the text is used, counted round: 0 is its beginning. Another seed is
            other calibration text wherever the text has twice the tokens, since some methods have no other randomness.
        progress: called with (windows done, windows in all) while the model writes.

    Raises:
        PrismError: no such source, or fewer than 256 tokens in it.
    """
    wanted = max(1, tokens // context)
    if source is None:
        return CalibrationText(sample_windows(model, wanted, context, seed, progress), SELF_SAMPLED)
    path = Path(source)
    parts = 1 if seed == 0 else PARTS
    text = read_text(path, parts * tokens * 16) if path.exists() else _hub_text(source, parts * tokens * 8)
    if tokenizer is None:
        raise PrismError(
            "the model has no tokenizer, so text cannot be used; leave out --text to sample from the model"
        )
    ids = torch.tensor(tokenize(tokenizer, text, parts * tokens))
    if len(ids) < 256:
        raise PrismError(
            f"calibration text {source} has {len(ids)} tokens; at least 256 are needed and 20,000 are recommended"
        )
    if len(ids) < context:
        context = len(ids)
    available = ids[: len(ids) // context * context].view(-1, context)
    count = min(wanted, len(available))
    begin = seed % (len(available) // count) * count
    return CalibrationText(available[begin : begin + count], text_name(path) if path.exists() else source)


def _hub_text(source: str, characters: int) -> str:
    if source.startswith((".", "/", "~")) or source.endswith((".txt", ".xz")):
        raise PrismError(f"no such calibration text: {source}")
    try:
        import datasets
    except ImportError:
        raise PrismError(
            f"{source} is neither a file nor a folder; to read it as a data set of the hub: "
            "pip install 'moe-prism[datasets]'"
        ) from None
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        parts: list[str] = []
        size = 0
        for row in rows:
            parts.append(row["text"])
            size += len(parts[-1])
            if size >= characters:
                break
    except Exception as error:
        raise PrismError(f"{source} is neither a file nor a folder, and as a data set: {error}") from None
    return "\n".join(parts)

"""Evaluation text: reading files, tokenising just enough of them, cutting windows.

Knows nothing of models or budgets.
"""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_prism.errors import PrismError

if TYPE_CHECKING:
    import torch

_SUFFIXES = (".txt", ".txt.xz", ".md")
# A first guess of characters per token that is rarely too small; a wrong guess costs one more round only.
_CHARS_PER_TOKEN = 8
# Tokens beyond the wanted ones, so that the cut at the end of the piece cannot have changed any wanted token.
_MARGIN_TOKENS = 64


def read_text(path: str | Path, max_chars: int | None = None) -> str:
    """The text of a UTF-8 file, of an xz-compressed one, or of all text files below a directory, joined by newlines.

    Args:
        path: A file (plain, or ``.xz``), or a directory whose ``.txt``, ``.txt.xz`` and ``.md`` files are read in
            the order of their names.
        max_chars: Stop after so many characters of each file; the rest is neither read nor checked. ``None`` for all.

    Raises:
        PrismError: the path does not exist, holds no text, is not UTF-8, or is a damaged xz file.
    """
    path = Path(path)
    if not path.exists():
        raise PrismError(f"text {str(path)!r} does not exist; name a .txt or .txt.xz file, or a directory of them")
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith(_SUFFIXES))
        if not files:
            raise PrismError(f"directory {str(path)!r} holds no text: files ending in {', '.join(_SUFFIXES)} are read")
        return "\n".join(read_text(file, max_chars) for file in files)
    try:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8", newline="") as file:
            text: str = file.read() if max_chars is None else file.read(max_chars)
    except (lzma.LZMAError, EOFError) as error:
        raise PrismError(f"text {str(path)!r} is not a whole xz file ({error}); copy it again") from None
    except UnicodeDecodeError as error:
        raise PrismError(f"text {str(path)!r} is not UTF-8 ({error}); convert it first, e.g. with iconv") from None
    if not text.strip():
        raise PrismError(f"text {str(path)!r} is empty; a few kilobytes are the least that can be measured on")
    return text


def text_name(path: str | Path) -> str:
    """A short name for reports: the file with its folder (``gutenberg/valid.txt.xz``), never a machine's full path."""
    resolved = Path(path).resolve()
    return "/".join(resolved.parts[-2:]).lstrip("/")


def tokenize(tokenizer: Any, text: str, max_tokens: int | None = None) -> list[int]:
    """The first ``max_tokens`` token ids of the text, without special tokens.

    Only as much text as needed is tokenised; the ids are those of tokenising all of it (for tokenisers that split
    into words first, as byte-level BPE does, and words of at most 64 tokens).

    Args:
        tokenizer: A transformers tokenizer.
        text: Any text.
        max_tokens: At least 1; ``None`` for all.

    Raises:
        PrismError: ``max_tokens`` below 1.
    """
    if max_tokens is not None and max_tokens < 1:
        raise PrismError(f"tokens must be at least 1, got {max_tokens}")
    chars = len(text) if max_tokens is None else (max_tokens + _MARGIN_TOKENS) * _CHARS_PER_TOKEN
    while True:
        piece = text[:chars]
        ids: list[int] = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if max_tokens is None or len(piece) == len(text):
            return ids[:max_tokens]
        if len(ids) >= max_tokens + _MARGIN_TOKENS:
            return ids[:max_tokens]
        chars *= 2


def windows(ids: list[int], context: int) -> torch.Tensor:
    """Cuts token ids into windows that predict every token once.

    Window i holds ids ``[i * context, (i + 1) * context]``: its first ``context`` tokens are the input, its last
    ``context`` the targets, so neighbours share one token and no target repeats. A last short window is dropped.

    Args:
        ids: Token ids.
        context: Predicted tokens per window, at least 1.

    Returns:
        int64 [n, context + 1], n >= 1.

    Raises:
        PrismError: context below 1, or too few tokens for one window.
    """
    import torch

    if context < 1:
        raise PrismError(f"context must be at least 1 token, got {context}")
    count = (len(ids) - 1) // context
    if count < 1:
        raise PrismError(
            f"the text has {len(ids)} tokens, one window of context {context} needs {context + 1}: "
            f"give more text or a smaller context"
        )
    flat = torch.tensor(ids[: count * context + 1], dtype=torch.int64)
    return flat.unfold(0, context + 1, context).contiguous()

"""Text in, a tokenizer and a flat file of token ids out; then deterministic training batches.

Knows nothing of the model. Batches depend only on (seed, step, rank), so a run that was killed
continues with exactly the tokens that it would have seen.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def read_blocks(path: Path, block_chars: int = 1 << 20) -> Iterator[str]:
    """Yield the text of a plain or ``.xz`` file in blocks that end at a line break."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as handle:
        while block := handle.read(block_chars):
            yield block + handle.readline()


def train_tokenizer(files: list[Path], vocab_size: int, max_chars: int) -> Tokenizer:
    """Byte-level BPE on blocks spread evenly over the files, at most about ``max_chars`` characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    blocks = [block for path in files for block in read_blocks(path)]
    total = sum(map(len, blocks))
    stride = max(1, -(-total // max_chars))
    tokenizer.train_from_iterator(iter(blocks[::stride]), trainer)
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """The Hugging Face form of the tokenizer; it adds no special token to a text."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
    )


def prepare(files: list[Path], workdir: Path, vocab_size: int, max_length: int) -> dict[str, object]:
    """Train the tokenizer and encode all files into ``workdir/tokens.bin`` (uint16), once.

    Returns what ``workdir/data.json`` holds: token and byte counts and the SHA-256 of every file.
    """
    meta_path = workdir / "data.json"
    digests = [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]
    if meta_path.exists():
        meta: dict[str, object] = json.loads(meta_path.read_text())
        if meta["vocab_size"] != vocab_size or meta["sha256"] != digests:
            raise SystemExit(f"{workdir} holds other data ({meta['names']}); name another --workdir")
        return meta
    workdir.mkdir(parents=True, exist_ok=True)
    print(f"training a {vocab_size}-token byte-level BPE", flush=True)
    tokenizer = train_tokenizer(files, vocab_size, max_chars=16_000_000)
    n_tokens = n_bytes = 0
    temporary = workdir / "tokens.bin.tmp"
    with temporary.open("wb") as out:
        for path in files:
            for block in read_blocks(path):
                ids = tokenizer.encode(block).ids
                out.write(np.asarray(ids, dtype=np.uint16).tobytes())
                n_tokens += len(ids)
                n_bytes += len(block.encode())
            print(f"encoded {path.name}: {n_tokens:,} tokens of {n_bytes:,} bytes", flush=True)
    os.replace(temporary, workdir / "tokens.bin")
    wrap_tokenizer(tokenizer, max_length).save_pretrained(workdir / "tokenizer")
    meta = {
        "names": [f.name for f in files],
        "sha256": digests,
        "vocab_size": vocab_size,
        "tokens": n_tokens,
        "bytes": n_bytes,
    }
    draft = meta_path.with_suffix(".tmp")
    draft.write_text(json.dumps(meta, indent=1))
    os.replace(draft, meta_path)
    return meta


class Batches:
    """Windows of ``context + 1`` tokens without overlap, in a new seeded order and phase every epoch."""

    def __init__(self, path: Path, context: int, per_step: int, seed: int) -> None:
        self.tokens = np.memmap(path, dtype=np.uint16, mode="r")
        self.context, self.per_step, self.seed = context, per_step, seed
        self.windows = (len(self.tokens) - 1) // context - 1
        if self.windows < per_step:
            raise SystemExit(f"{len(self.tokens):,} tokens are too few for {per_step} windows of {context}")
        self._order: tuple[int, np.ndarray, int] | None = None

    def _epoch(self, epoch: int) -> tuple[np.ndarray, int]:
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._order = (epoch, rng.permutation(self.windows), int(rng.integers(self.context)))
        return self._order[1], self._order[2]

    def get(self, step: int, rank: int, ranks: int) -> torch.Tensor:
        """The share of ``rank`` in step ``step``: int64 ``[per_step // ranks, context + 1]``."""
        mine = range(rank, self.per_step, ranks)
        rows = []
        for i in mine:
            epoch, position = divmod(step * self.per_step + i, self.windows)
            order, phase = self._epoch(epoch)
            start = int(order[position]) * self.context + phase
            rows.append(self.tokens[start : start + self.context + 1].astype(np.int64))
        return torch.from_numpy(np.stack(rows))

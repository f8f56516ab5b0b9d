"""The bundled model offloaded: whether its text is that of the model in memory, and what 4 bits cost in quality.

Knows nothing of time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from moe_prism import budget, load_elastic, set_budget
from moe_prism.elastic import full_budget
from moe_prism.evaluation.measure import Run, measure
from moe_prism.evaluation.points import paired_difference
from moe_prism.evaluation.text import read_text, tokenize, windows
from moe_prism.offload import load_offloaded, pack_checkpoint, set_stored
from moe_prism.offload.block_file import BlockFile
from moe_prism.offload.load import attach_blocks, load_resident, manager_of
from moe_prism.offload.pack import BLOCKS_FILE

QUALITY_TOKENS = 8192


def equal_texts(checkpoint: Path, packed: Path) -> list[dict[str, Any]]:
    """The bundled model with a quarter of its blocks in memory against the whole one, greedy, in fp32."""
    if not packed.exists():
        pack_checkpoint(checkpoint, packed, shadow_bits=4)
    whole = load_elastic(checkpoint, dtype=torch.float32)
    model, elastic = load_resident(packed, torch.float32)
    file = BlockFile(packed / BLOCKS_FILE)
    manager = attach_blocks(model, file, file.layout.blocks // 4)
    found = []
    for k_active in (elastic.full_budget // 4, elastic.full_budget // 2, elastic.full_budget):
        for one in (whole, model):
            set_budget(one, k_active)
        prompt = torch.arange(100, 116)[None]
        texts = [
            one.generate(prompt, max_new_tokens=200, min_new_tokens=200, do_sample=False) for one in (whole, model)
        ]
        same = bool(torch.equal(*texts))
        found.append({"k_active": k_active, "tokens": 200, "equal": same})
        print(f"bundled model, budget {k_active}: 200 tokens {'equal' if same else 'DIFFER'}", file=sys.stderr)
    manager.close()
    return found


def quality(packed: Path, text: Path) -> list[dict[str, Any]]:
    """What budgets lose on the bundled model, all of them as stored or the lesser part at 4 bits: KL in nats."""
    model = load_offloaded(packed, 4_000_000_000, dtype=torch.float32, shadow=0.5)
    tokenizer = AutoTokenizer.from_pretrained(packed)
    ids = windows(tokenize(tokenizer, read_text(text, 16 * QUALITY_TOKENS), QUALITY_TOKENS + 1), 256)
    full = full_budget(model)

    @contextmanager
    def at(k_active: int, k_stored: int) -> Iterator[None]:
        set_stored(model, k_stored)
        try:
            with budget(model, k_active):
                yield
        finally:
            set_stored(model, None)

    pairs = [(k, k * part // 4) for k in (full, full // 2, full // 4) for part in (4, 2, 1) if k * part // 4]
    runs = [Run(f"{k} {stored}", partial(at, k, stored)) for k, stored in pairs]
    measured = measure(model, ids, [Run("full", None), *runs])
    found = []
    for (k_active, k_stored), run in zip(pairs, runs, strict=True):
        result = measured[run.name]
        excess, error = paired_difference(result.nll, measured["full"].nll)
        row = {"k_active": k_active, "k_stored": k_stored, "kl": result.kl, "excess_nats": excess, "stderr": error}
        found.append(row)
        print(f"bundled model, {k_active} of {full}, {k_stored} as stored: KL {result.kl:.4f}", file=sys.stderr)
    manager_of(model).close()
    return found

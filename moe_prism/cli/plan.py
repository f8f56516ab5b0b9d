"""``moe-prism plan``: what a packed checkpoint will do in a memory, before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import out
from .sweep import parse_budgets


def plan(
    checkpoint: Annotated[Path, typer.Argument(help="Packed checkpoint, where it will run.")],
    memory: Annotated[str, typer.Option(help="Of the whole process, or with --device of that, e.g. 4GB.")],
    text: Annotated[
        Path | None, typer.Option(help="Text like those to come. Without: text sampled from the model, which is slow.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=32, help="Of the text.")] = 256,
    context: Annotated[int, typer.Option(min=1, help="Tokens of prompt and output that memory is kept for.")] = 4096,
    budgets: Annotated[str | None, typer.Option(help="Such as 4,8,16; by default the measured points.")] = None,
    k_stored: Annotated[
        int | None, typer.Option(help="Of each budget, how many sub-experts run as stored, the rest at 4 bits.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cuda or cuda:N, as `moe-prism generate` takes it. No GPU tried yet.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare the files with their checksums first.")] = True,
) -> None:
    """Say which hit rate, time and quality to expect at every budget.

    Runs the text once (every block is read at most once), measures the disk, and rehearses the cache.

    Example: moe-prism plan olmoe-packed --memory 4GB --text wiki.txt
    """
    from ..errors import PrismError
    from .console import accelerator_named, bytes_of

    limit, asked = bytes_of(memory), parse_budgets(budgets)
    accelerator = accelerator_named(device, k_stored)
    from ..checkpoint.read import open_checkpoint

    opened = open_checkpoint(checkpoint, verify=False)
    full = opened.elastic.full_budget
    bad = [k for k in asked or () if not 1 <= k <= full]
    if bad:
        raise PrismError(f"--budgets must be from 1 to {full} (full budget), got {bad[0]}")
    if k_stored is not None and not 1 <= k_stored <= full:
        raise PrismError(f"--k-stored must be from 1 to {full} (full budget), got {k_stored}")
    import torch
    from rich.table import Table

    from ..evaluation.text import read_text
    from ..offload import load_offloaded
    from ..offload.load import SHADOW_SHARE
    from ..offload.plan import plan as expect
    from .console import load_tokenizer, quiet

    quiet()
    measured = opened.operating_points()
    quality = {} if measured is None else {point.k_active: point for point in measured.elastic}
    shadow = None if k_stored is None else SHADOW_SHARE
    model = load_offloaded(
        checkpoint, limit, context=max(context, tokens), shadow=shadow, device=accelerator, verify=verify
    )
    if text is None:
        from ..evaluation.sampling import sample_windows

        ids = sample_windows(model, 1, tokens, seed=0)[0]
    else:
        read = read_text(text, max_chars=16 * tokens)
        ids = torch.tensor(load_tokenizer(str(checkpoint))(read).input_ids[:tokens])
    shares = sorted({max(1, round(full * eighth / 8)) for eighth in (1, 2, 3, 4, 6, 8)})
    found = expect(model, ids, asked or sorted(quality) or shares, k_stored=k_stored)
    source = "disk" if device is None else "bus"
    out.print(
        f"{found.slots} of {found.blocks} blocks fit; the {source} gives {found.bandwidth / 1e9:.2f} GB/s",
        soft_wrap=True,
    )
    table = Table("budget", "found in memory", "ms a token", "rise of perplexity", "KL to full")
    for point in found.points:
        known, best = quality.get(point.k_active), quality.get(full)
        if k_stored is not None and point.k_active > k_stored:
            known = None  # measured as stored
        rise = f"{known.ppl / best.ppl - 1:+.1%}" if known and best else "not measured"
        table.add_row(
            str(point.k_active),
            f"{point.hit_rate:.1%}",
            f"{1e3 * point.least:.0f} to {1e3 * point.most:.0f}",
            rise,
            "" if known is None else f"{known.kl:.4f}",
        )
    out.print(table)

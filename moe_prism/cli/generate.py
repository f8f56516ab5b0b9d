"""``moe-prism generate``: text at any budget, streamed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Dtype


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="Elastic checkpoint.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    k_active: Annotated[int | None, typer.Option(help="Budget, 1..full; full by default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Of the weights in memory.")] = "auto",
    verify: Annotated[bool, typer.Option(help="Compare the files with their checksums first.")] = True,
    memory: Annotated[
        str | None,
        typer.Option(help="Of the whole process (with --device: of that), e.g. 4GB; for what `moe-prism pack` wrote."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cuda or cuda:N: compute there, blocks in the host's memory; with --memory. No GPU tried yet."
        ),
    ] = None,
    tpot_ms: Annotated[
        float | None, typer.Option(help="Milliseconds of a token, within which blocks are read; with --memory.")
    ] = None,
    k_min: Annotated[int | None, typer.Option(help="Least budget that --tpot-ms may lead to; 1 by default.")] = None,
    k_stored: Annotated[
        int | None,
        typer.Option(help="Of the budget, how many run as stored, the rest at 4 bits; with --memory, if packed so."),
    ] = None,
) -> None:
    """Continue a prompt at a budget.

    Example: moe-prism generate olmoe-elastic --prompt "The sea was" --k-active 9, or, of a packed checkpoint,
    moe-prism generate olmoe-packed --memory 4GB --tpot-ms 200 --k-min 9 --prompt "The sea was"
    """
    from ..errors import PrismError
    from .console import accelerator_named, bytes_of

    limit = None if memory is None else bytes_of(memory)
    if device is not None and limit is None:
        raise PrismError(
            "--device is for a checkpoint that `moe-prism pack` wrote, and needs --memory: how much of that device's "
            "memory it may have"
        )
    if tpot_ms is not None and limit is None:
        raise PrismError("--tpot-ms says which blocks are worth reading, so it needs --memory")
    if k_min is not None and tpot_ms is None:
        raise PrismError("--k-min is the least that --tpot-ms may lead to, so it needs that; --k-active sets a budget")
    if k_stored is not None and (limit is None or tpot_ms is not None):
        raise PrismError(
            "--k-stored says how many sub-experts of an offloaded token run as stored: it needs --memory, and no "
            "--tpot-ms, by which time decides that"
        )
    from ..checkpoint.read import open_checkpoint
    from ..elastic.dial import Dial

    accelerator = accelerator_named(device, k_stored)
    budget = Dial(open_checkpoint(checkpoint, verify=False).elastic.full_budget)
    chosen = budget.full_budget if k_active is None else budget.check(k_active)
    floor = 1 if k_min is None else budget.check(k_min)
    stored = None if k_stored is None else budget.check(k_stored, "k_stored")
    from transformers import TextStreamer

    from ..elastic import load_elastic, set_budget
    from .console import compute_dtype, load_tokenizer, quiet

    quiet()
    tokenizer = load_tokenizer(str(checkpoint))
    if limit is None:
        model = load_elastic(checkpoint, dtype=compute_dtype(dtype), verify=verify)
        set_budget(model, chosen)
        print(prompt, end="", flush=True)
        continue_text(
            model, tokenizer, prompt, max_new_tokens, temperature, seed, TextStreamer(tokenizer, skip_prompt=True)
        )
        return
    from ..offload import load_offloaded, set_deadline, set_stored
    from ..offload.load import SHADOW_SHARE, has_shadow, manager_of
    from .offloaded import shown

    length = len(tokenizer(prompt).input_ids) + max_new_tokens
    copied = stored is not None or (tpot_ms is not None and device is None and has_shadow(checkpoint))
    shadow = SHADOW_SHARE if copied else None
    model = load_offloaded(
        checkpoint, limit, dtype=dtype, context=length, shadow=shadow, device=accelerator, verify=verify
    )
    set_budget(model, chosen)
    pace = None
    if tpot_ms is not None:
        pace = set_deadline(model, tpot_ms, floor)
    elif stored is not None:
        set_stored(model, stored)
    with shown(tokenizer, prompt, manager_of(model), pace) as streamer:
        continue_text(model, tokenizer, prompt, max_new_tokens, temperature, seed, streamer)


def continue_text(
    model: object, tokenizer: object, prompt: str, tokens: int, temperature: float, seed: int, streamer: object = None
) -> str:
    """Generate from a prompt with transformers; returns prompt and continuation."""
    import torch

    from ..errors import PrismError

    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)  # type: ignore[attr-defined, operator]
    if ids.shape[1] == 0:
        raise PrismError("the prompt is empty; give at least one word")
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        written = model.generate(  # type: ignore[attr-defined]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, streamer=streamer, **sampling
        )
    text: str = tokenizer.decode(written[0], skip_special_tokens=True)  # type: ignore[attr-defined]
    return text

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
        str | None, typer.Option(help="Of the whole process, e.g. 4GB; for a checkpoint that `moe-prism pack` wrote.")
    ] = None,
) -> None:
    """Continue a prompt at a budget.

    Example: moe-prism generate olmoe-elastic --prompt "The sea was" --k-active 9
    """
    from .console import bytes_of

    limit = None if memory is None else bytes_of(memory)
    from ..checkpoint.read import open_checkpoint
    from ..elastic.dial import Dial

    budget = Dial(open_checkpoint(checkpoint, verify=False).elastic.full_budget)
    chosen = budget.full_budget if k_active is None else budget.check(k_active)
    from transformers import TextStreamer

    from ..elastic import load_elastic, set_budget
    from .console import compute_dtype, load_tokenizer, quiet

    quiet()
    if limit is None:
        model = load_elastic(checkpoint, dtype=compute_dtype(dtype), verify=verify)
    else:
        from ..offload import load_offloaded

        model = load_offloaded(checkpoint, limit, dtype=compute_dtype(dtype), verify=verify)
    tokenizer = load_tokenizer(str(checkpoint))
    set_budget(model, chosen)
    print(prompt, end="", flush=True)
    continue_text(
        model, tokenizer, prompt, max_new_tokens, temperature, seed, TextStreamer(tokenizer, skip_prompt=True)
    )
    if limit is not None:
        from ..offload.load import manager_of
        from .console import err

        counted = manager_of(model).statistics
        err.print(
            f"blocks: {counted.hit_rate:.1%} found in memory, {counted.bytes_read / 1e9:.2f} GB read, "
            f"{counted.stall_seconds:.2f} s waited, read ahead {counted.precision:.1%} right",
            soft_wrap=True,
        )


def continue_text(
    model: object, tokenizer: object, prompt: str, tokens: int, temperature: float, seed: int, streamer: object = None
) -> str:
    """Generate from a prompt with transformers; returns prompt and continuation."""
    import torch

    from ..errors import PrismError

    ids = tokenizer(prompt, return_tensors="pt").input_ids  # type: ignore[operator]
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

"""``moe-prism pack``: a checkpoint whose sub-experts can stay on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from .console import bars, out


def pack(
    checkpoint: Annotated[Path, typer.Argument(help="Elastic checkpoint; it is only read.")],
    output: Annotated[Path, typer.Argument(help="New directory, on the disk to run from.")],
    shadow_bits: Annotated[
        int, typer.Option(help="4: also write a copy of every block at 4 bits, for --k-stored and --tpot-ms.")
    ] = 0,
    verify: Annotated[bool, typer.Option(help="Compare the files with their checksums first.")] = True,
) -> None:
    """Write every sub-expert as one block of a file, to run the model in less memory than its size.

    Interrupted, the same command goes on where it stopped. Gates that compute neurons (proxy) cannot be packed.

    Example: moe-prism pack olmoe-elastic olmoe-packed, then
    moe-prism generate olmoe-packed --memory 4GB --prompt "The sea was"
    """
    from ..offload import pack_checkpoint
    from .console import quiet

    quiet()
    with bars({"pack": "writing blocks"}) as tell:
        layout = pack_checkpoint(
            checkpoint,
            output,
            shadow_bits=cast(Literal[0, 4], shadow_bits),  # checked there
            verify=verify,
            progress=lambda done, all_: tell("pack", done, all_),
        )
    beside = ", and a copy of each at 4 bits" if shadow_bits else ""
    out.print(f"{output}: {layout.blocks} blocks of {layout.stride / 1e6:.2f} MB{beside}", soft_wrap=True)

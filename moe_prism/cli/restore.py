"""``moe-prism restore``: the original checkpoint back from an elastic one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import out


def restore(
    checkpoint: Annotated[Path, typer.Argument(help="Elastic checkpoint; it is only read.")],
    output: Annotated[Path, typer.Argument(help="New directory for the original model.")],
) -> None:
    """Undo the neuron permutation: the original weights, bit for bit.

    Example: moe-prism restore olmoe-elastic olmoe-original
    """
    from ..checkpoint.restore import restore_checkpoint
    from .console import quiet

    quiet()
    restore_checkpoint(checkpoint, output)
    out.print(f"{output}: the original weights", soft_wrap=True)

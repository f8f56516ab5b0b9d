"""What commands share: a console, progress bars on stderr, the dtype that is fast on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    import torch

    from ..offload.accelerator import Accelerator

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

out = Console()
err = Console(stderr=True)


@contextmanager
def bars(labels: dict[str, str]) -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on stderr, one per stage, shown when a stage first reports.

    Args:
        labels: what to print for a stage; others are shown under their own name.
    """
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=err)
    tasks: dict[str, TaskID] = {}

    def tell(stage: str, done: int, total: int) -> None:
        progress.start()  # only now: bad input that is refused before any work leaves no trace on the screen
        if stage not in tasks:
            tasks[stage] = progress.add_task(labels.get(stage, stage), total=total)
        progress.update(tasks[stage], completed=done, total=total)

    try:
        yield tell
    finally:
        if tasks:
            progress.stop()


def compute_dtype(dtype: Dtype) -> str | torch.dtype:
    """What to load weights in: "auto" is the stored dtype, or fp32 on a CPU without bf16 arithmetic."""
    import torch

    if dtype != "auto":
        chosen: torch.dtype = getattr(torch, dtype)
        return chosen
    if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "auto"
    return torch.float32


def quiet() -> None:
    """No progress bars of transformers between ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a checkpoint; raises PrismError if it has none."""
    from transformers import AutoTokenizer

    from ..errors import PrismError

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise PrismError(f"{path} has no tokenizer that can be loaded: {error}") from None


def bytes_of(size: str) -> int:
    """A number of bytes from "4GB", "512MB" or "1.5GiB"; raises PrismError for anything else."""
    from ..errors import PrismError

    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
    text = size.strip().upper()
    unit = next((name for name in sorted(units, key=len, reverse=True) if text.endswith(name)), "")
    try:
        number = float(text.removesuffix(unit)) * units[unit]
    except (ValueError, KeyError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise PrismError(f"a memory is a number above 0 and a unit ({', '.join(units)}), such as 4GB; got {size!r}")
    return int(number)


def accelerator_named(device: str | None, k_stored: int | None) -> Accelerator | None:
    """What ``--device`` names; None without it.

    Raises:
        PrismError: there is no such device, or ``--k-stored`` wants blocks at 4 bits on it.
    """
    if device is None:
        return None
    from ..errors import PrismError
    from ..offload.accelerator import open_accelerator

    if k_stored is not None:
        raise PrismError(
            f"--k-stored {k_stored} runs blocks at 4 bits, which are for the CPU; leave it out, or --device {device}"
        )
    return open_accelerator(device)

"""llama.cpp beside the other engines: its file, a cold page cache, and a group whose memory is limited.

Its routing cannot be given to it. It runs all experts that its own router chooses, which is what random weights give:
close to uniform (``docs/benchmarks.md``). Runs under the bench's Python; ``llama_peer`` is what is measured. Knows
nothing of the other engines.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from moe_prism.offload.block_file import read_layout
from moe_prism.offload.pack import BLOCKS_FILE, RESIDENT_FILE

from .memory_group import NoLimit, memory_group


def refusal(python: Path | None) -> str | None:
    """Why llama.cpp cannot take part; None if it can."""
    if python is None:
        return "no --llama-python, an interpreter with llama-cpp-python and gguf, is given"
    try:
        with memory_group(1 << 30):
            return None
    except NoLimit as error:
        return f"{error}, and without a limit the page cache would hold the whole model"


def pieces(packed: Path) -> dict[str, Any]:
    """Where the weights of a packed checkpoint of whole experts are, for a Python that knows no block files."""
    layout = read_layout(packed / BLOCKS_FILE)
    assert (layout.num_sub_experts, layout.dtype, layout.interleaved) == (1, "bfloat16", False)
    return {
        "config": json.loads((packed / "config.json").read_text()),
        "resident": str((packed / RESIDENT_FILE).resolve()),
        "blocks": str((packed / BLOCKS_FILE).resolve()),
        "blocks_at": layout.blocks_at,
        "stride": layout.stride,
        "layers": layout.layers,
        "num_experts": layout.num_experts,
        "neurons": layout.neurons,
        "hidden_size": layout.hidden_size,
    }


def write_file(python: Path, packed: Path, out: Path, environment: dict[str, str]) -> None:
    """The model as a GGUF file; raises CalledProcessError."""
    described = out.with_name(out.name + ".pieces.json")
    described.write_text(json.dumps(pieces(packed)))
    subprocess.run([python, "-m", "offload_bench.llama_gguf", described, out], check=True, env=environment)
    described.unlink()


def forget_pages(file: Path) -> None:
    """Take a file out of the page cache, so that it is read from the disk, and counts for who reads it then."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())  # pages that are not written yet would stay
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

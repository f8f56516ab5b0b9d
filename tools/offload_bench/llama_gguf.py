"""Write the model of the offloading bench as a GGUF file, straight from its block file of whole experts.

    LLAMA_PYTHON -m offload_bench.llama_gguf PIECES.json FILE.gguf

Runs under llama.cpp's Python, without torch and moe-prism: ``pieces`` of ``llama.py`` says where weights are. Files are
mapped and one stacked tensor is in memory at a time (0.27 GB of OLMoE's), so 14 GB need no memory of that size. Knows
nothing of time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from decode_bench.gguf_file import bf16_file, write_weights
from numpy.typing import NDArray


def weights(pieces: dict[str, Any]) -> dict[str, NDArray[np.uint16]]:
    """All weights by their names on the hub, as bit patterns of mapped files."""
    found = bf16_file(Path(pieces["resident"]))
    neurons, hidden = pieces["neurons"], pieces["hidden_size"]
    blocks = np.memmap(pieces["blocks"], np.uint16, "r", pieces["blocks_at"])
    blocks = blocks.reshape(-1, pieces["stride"] // 2)[:, : 3 * neurons * hidden].reshape(-1, 3, neurons, hidden)
    for layer, experts in enumerate(pieces["layers"]):
        for expert in range(pieces["num_experts"]):
            gate, up, down = blocks[layer * pieces["num_experts"] + expert]
            name = f"{experts}.{expert}"
            found |= {
                f"{name}.gate_proj.weight": gate,
                f"{name}.up_proj.weight": up,
                f"{name}.down_proj.weight": down.T,
            }
    return found


if __name__ == "__main__":
    described: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    write_weights(described["config"], weights(described), Path(sys.argv[2]))

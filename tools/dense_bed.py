"""A dense model as a test bed: written as an MoE model with one expert per layer, for every tool of the project.

    python tools/dense_bed.py SmolLM2-135M-Instruct.Q4_1.gguf build/beds/smollm2
    python tools/dense_bed.py DIRECTORY-OR-HUB-NAME OUT

A GGUF file needs the package gguf (`pip install 'moe-prism[beds]'`). Weights are written as fp32 where they come from
a GGUF file, whose blocks no 16-bit type holds exactly, else in their stored dtype.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_prism.checkpoint.atomic import atomic_directory, check_output
from moe_prism.errors import PrismError
from moe_prism.experts import dense_as_experts


def load_dense(source: str) -> tuple[Any, Any]:
    """The dense model and its tokenizer.

    Raises:
        PrismError: it cannot be loaded.
    """
    path = Path(source)
    if path.suffix == ".gguf" and not path.is_file():
        raise PrismError(f"no such file: {source}")
    where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    folder = str(path.parent) if where else source
    dtype: Any = torch.float32 if where else "auto"
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **where)
        return model, AutoTokenizer.from_pretrained(folder, **where)
    except ImportError as error:
        raise PrismError(f"{source} needs another package: {error}; pip install 'moe-prism[beds]'") from None
    except (OSError, ValueError) as error:
        raise PrismError(f"{source} cannot be loaded as a causal language model: {error}") from None


def main() -> int:
    """Load, view, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a .gguf file, a model directory, or a name on the hub")
    parser.add_argument("out", type=Path, help="a new directory")
    args = parser.parse_args()
    try:
        check_output(args.out)
        model, tokenizer = load_dense(args.source)
        view = dense_as_experts(model)
    except PrismError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with atomic_directory(args.out) as folder:
        view.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"wrote {args.out}: {view.num_parameters() / 1e6:.1f}M parameters, {view.config.model_type}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

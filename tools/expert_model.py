"""Write an elastic checkpoint of OLMoE's kind with random weights, in which the experts are most of a step.

The bundled model's steps are mostly overhead: it is small. What budgets do to a step's time shows on this one; its
texts mean nothing. Knows nothing of time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from decode_bench.checkpoint import write_model

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 512,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
}


def main() -> None:
    """Parse the arguments and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new directory; 0.1 GB a layer")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_model(arguments.out, arguments.layers, arguments.seed, **SIZES)


if __name__ == "__main__":
    main()

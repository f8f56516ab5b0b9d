"""Peak memory of profiling one MoE layer of a 30B-A3B shape, beside the weights.

    python tools/bench_profile_memory.py --out docs/results/profile_memory.json

Builds random layers of that shape (128 experts, 768 neurons, hidden 2048, top-8), runs the real capture and
the real per-layer refactoring on random tokens, and reads the peak resident set from the kernel. The whole
model (48 layers) does not fit on a small machine; what grows with its depth is the capture of one batch,
which is computed and added. Knows nothing of quality.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

from moe_prism.waiting import brief_waiting

os.environ.update(brief_waiting())  # before torch

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moe_prism.checkpoint.atomic import replace_file
from moe_prism.evaluation.environment import machine, versions
from moe_prism.experts import find_expert_layers
from moe_prism.refactor import Recipe
from moe_prism.refactor.capture import TOKENS_PER_BATCH, capture, read_layer
from moe_prism.refactor.layer import refactor_layer
from moe_prism.refactor.pipeline import check_recipe

FULL_DEPTH = 48


def peak_bytes() -> int:
    """Highest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=20_480)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=4096,
        hidden_size=2048,
        moe_intermediate_size=768,
        intermediate_size=6144,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    layers = find_expert_layers(model)
    recipe = Recipe(calibration_tokens=args.tokens, solver="balanced", gate="static", neurons="all")
    solver, gate = check_recipe(recipe, layers)
    before = peak_bytes()
    started = time.monotonic()
    windows = torch.randint(0, 4096, (args.tokens // 256, 256))
    with tempfile.TemporaryDirectory() as folder:
        capture(model, layers, windows, Path(folder))
        captured, peak_capture = time.monotonic(), peak_bytes()
        for number, layer in enumerate(layers):
            refactor_layer(layer, number, read_layer(Path(folder), layer), recipe, solver, gate)
    deeper = (FULL_DEPTH - args.layers) * TOKENS_PER_BATCH * (2048 * 2 + 8 * 6)  # 16-bit hidden states of a real model
    result = {
        "shape": "128 experts, 768 neurons, hidden 2048, top-8, N = 4",
        "layers": args.layers,
        "tokens": args.tokens,
        "seed": args.seed,
        "weights_gb": weights / 1e9,
        "resident_before_gb": before / 1e9,
        "capture_above_weights_gb": (peak_capture - before) / 1e9,
        "whole_run_above_weights_gb": (peak_bytes() - before) / 1e9,
        "one_batch_of_the_other_layers_gb": deeper / 1e9,
        "predicted_above_model_gb": (peak_bytes() - before + deeper) / 1e9,
        "capture_seconds": captured - started,
        "seconds_per_layer": (time.monotonic() - captured) / args.layers,
        "machine": machine(model),
        "versions": versions(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(args.out, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

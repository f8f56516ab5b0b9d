"""What checkpoint tests are made of: a small bf16 OLMoE, random permutations, measured-looking points."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model
from transformers import PreTrainedModel

from moe_prism.checkpoint.schema import (
    BaselinePoint,
    Calibration,
    DistinctStable,
    ElasticConfig,
    OperatingPoint,
    OperatingPoints,
    permutation_key,
)
from moe_prism.checkpoint.write import write_checkpoint

LAYERS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
EXPERTS, NEURONS, TOP_K, N = 4, 8, 2, 4


def elastic_config(**changes: Any) -> ElasticConfig:
    fields: dict[str, Any] = {
        "num_sub_experts": N,
        "num_experts": EXPERTS,
        "num_neurons": NEURONS,
        "top_k": TOP_K,
        "full_budget": TOP_K * N,
        "gate": "static",
        "solver": "balanced",
        "seed": 0,
        "layers": LAYERS,
        "calibration": Calibration(text="sample", tokens=64),
        "weights_dtype": "bfloat16",
        "created_with": {"moe-prism": "0.1.0"},
    }
    return ElasticConfig(**{**fields, **changes})


def elastic_point(k: int, full: int, **changes: Any) -> OperatingPoint:
    nll = 5.0 - k / full
    fields: dict[str, Any] = {
        "k_active": k,
        "share": k / full,
        "nll": nll,
        "ppl": math.exp(nll),
        "kl": 1 - k / full,
        "top1_agreement": k / full,
        "flops_share": k / full,
        "bytes_share": k / full,
        "stderr": None if k == full else 0.01,
        "distinct": True,
        "stable": True,
    }
    return OperatingPoint(**{**fields, **changes})


def baseline_point(k: int, top_k: int, **changes: Any) -> BaselinePoint:
    fields = {"k": k, "share": k / top_k, "nll": 4.5, "ppl": math.exp(4.5), "kl": 0.2, "top1_agreement": 0.5}
    return BaselinePoint(**{**fields, "distinct": True, "stable": False, **changes})


def measured(**changes: Any) -> OperatingPoints:
    full = TOP_K * N
    fields: dict[str, Any] = {
        "full_budget": full,
        "text": "sample",
        "tokens": 640,
        "seed": 0,
        "versions": {"torch": "2"},
        "machine": {"cpu": "some", "cores": 2},
        "elastic": [elastic_point(k, full) for k in range(1, full + 1)],
        "baseline": [baseline_point(k, TOP_K) for k in range(1, TOP_K + 1)],
        "distinct_stable": DistinctStable(elastic=full, baseline=0),
        "full_budget_max_logit_diff": 1e-6,
    }
    return OperatingPoints(**{**fields, **changes})


def bf16_model() -> PreTrainedModel:
    """4 experts of 8 neurons in two layers."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_experts": EXPERTS, "intermediate_size": NEURONS}
    return tiny_model("olmoe", num_experts_per_tok=TOP_K, **sizes).to(torch.bfloat16)


def random_permutations() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        permutation_key(layer): torch.stack(
            [torch.randperm(NEURONS, generator=generator).int() for _ in range(EXPERTS)]
        )
        for layer in LAYERS
    }


def config_only(path: Path) -> None:
    """A ``save_model`` that writes the least that counts as a model."""
    (path / "config.json").write_text('{"model_type": "olmoe"}')
    (path / "model.safetensors").write_bytes(b"weights")


def write_small(out: Path, **changes: Any) -> None:
    """``write_checkpoint`` of no real model."""
    arguments: dict[str, Any] = {
        "save_model": config_only,
        "elastic": elastic_config(),
        "tensors": random_permutations(),
        "recipe_yaml": "gate: static\n",
        "card": "# Card\n",
    }
    write_checkpoint(out, **{**arguments, **changes})


def contents(root: Path) -> dict[str, bytes]:
    """Every file below ``root``, hidden ones too, with its bytes."""
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

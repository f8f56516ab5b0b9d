"""Tiny random models of every supported family, in fp32, for parity tests."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_DEEPSEEK: dict[str, Any] = {
    "moe_intermediate_size": 16,
    "intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 4, "num_key_value_heads": 4},
    "mixtral": {"intermediate_size": 16, "num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "shared_expert_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 4,
    },
    "qwen3_moe": {
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "head_dim": 8,
    },
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "deepseek_v3": {**_DEEPSEEK, "n_group": 2, "topk_group": 1, "norm_topk_prob": True},
    "gpt_oss": {
        "intermediate_size": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granitemoe": {"intermediate_size": 16, "num_local_experts": 8, "num_experts_per_tok": 4},
    "phimoe": {"intermediate_size": 16, "num_local_experts": 6, "num_experts_per_tok": 2},
    "glm4_moe": {
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "first_k_dense_replace": 0,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 8,
    },
    "ernie4_5_moe": {
        "moe_intermediate_size": 16,
        "intermediate_size": 48,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 0,
        "moe_layer_end_index": 1,
        "moe_layer_interval": 1,
    },
}


def tiny_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A 2-layer random model of the family: fp32, eval mode, weights large enough to route clearly."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():  # default initialisation is so small that every expert looks alike
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            elif parameter.ndim == 1 and parameter.abs().max() == 0:
                parameter.normal_(std=0.3)  # biases
    return model


def tokens(batch: int = 2, length: int = 12, seed: int = 0, vocabulary: int = 96) -> torch.Tensor:
    """Random token ids ``[batch, length]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)

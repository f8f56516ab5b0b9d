"""Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM

from .elastic import ElasticModel


class ElasticQwen3Moe(ElasticModel, Qwen3MoeForCausalLM):
    """See ``ElasticModel``; vLLM looks at the constructor, so it is spelled out."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)

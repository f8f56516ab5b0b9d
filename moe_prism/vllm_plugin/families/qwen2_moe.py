"""Qwen2-MoE."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.qwen2_moe import Qwen2MoeForCausalLM

from .elastic import ElasticModel


class ElasticQwen2Moe(ElasticModel, Qwen2MoeForCausalLM):
    """See ``ElasticModel``; vLLM looks at the constructor, so it is spelled out."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)

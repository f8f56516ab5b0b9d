"""DeepSeek-V2 and -V3: group limits, correction biases and scaled outputs are vLLM's router's and runner's business."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.deepseek_v2 import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

from .elastic import ElasticModel


class ElasticDeepseekV2(ElasticModel, DeepseekV2ForCausalLM):
    """See ``ElasticModel``; vLLM looks at the constructor, so it is spelled out."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)


class ElasticDeepseekV3(ElasticModel, DeepseekV3ForCausalLM):
    """See ``ElasticModel``; vLLM looks at the constructor, so it is spelled out."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)

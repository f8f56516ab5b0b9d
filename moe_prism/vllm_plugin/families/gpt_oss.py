"""GPT-OSS, where its experts are not quantised."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.gpt_oss import GptOssForCausalLM

from .elastic import ElasticModel


class ElasticGptOss(ElasticModel, GptOssForCausalLM):
    """See ``ElasticModel``; vLLM looks at the constructor, so it is spelled out."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)

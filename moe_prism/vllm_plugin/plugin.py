"""The entry point ``vllm.general_plugins``: vLLM calls ``register`` in every process before it builds anything.

A stock model is served as without the plugin. Knows nothing of what the registered classes do.
"""

from __future__ import annotations

import logging

from . import symbols

logger = logging.getLogger("moe_prism.vllm_plugin")

# vLLM's name of an architecture -> our class
_FAMILIES = "moe_prism.vllm_plugin.families"
MODELS = {
    "OlmoeForCausalLM": f"{_FAMILIES}.olmoe:ElasticOlmoe",
    "MixtralForCausalLM": f"{_FAMILIES}.mixtral:ElasticMixtral",
    "Qwen2MoeForCausalLM": f"{_FAMILIES}.qwen2_moe:ElasticQwen2Moe",
    "Qwen3MoeForCausalLM": f"{_FAMILIES}.qwen3_moe:ElasticQwen3Moe",
    "DeepseekV2ForCausalLM": f"{_FAMILIES}.deepseek:ElasticDeepseekV2",
    "DeepseekV3ForCausalLM": f"{_FAMILIES}.deepseek:ElasticDeepseekV3",
    "GptOssForCausalLM": f"{_FAMILIES}.gpt_oss:ElasticGptOss",
}


def register() -> None:
    """Register our classes in the place of vLLM's, and our check of a request's arguments.

    With a vLLM that this plugin was not written for nothing is registered: stock models are none of our business. Our
    worker and scheduler then refuse to start, with what moved.
    """
    reason = symbols.trouble()
    if reason is not None:
        logger.warning("no budgets: %s", reason)
        return
    from vllm import ModelRegistry

    from . import admission, numba_guard

    for architecture, name in MODELS.items():
        ModelRegistry.register_model(architecture, name)
    admission.install()
    numba_guard.install()

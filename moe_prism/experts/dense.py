"""The view of a dense model as a Mixture-of-Experts model: every FFN is one expert, and every token is routed to it.

The view is a model of a stock MoE family whose attention computes what the dense family's does, so it can be saved,
loaded and refactored like any other. It exists to try methods on well-trained dense networks; a dense model is never
viewed this way unless this module is asked to. Knows nothing of sub-experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..errors import UnsupportedModelError


@dataclass(frozen=True)
class _Family:
    """How a dense family's settings are named in its MoE counterpart.

    Attributes:
        moe: model type of the counterpart.
        neurons: its field for the neurons of an expert.
        experts: its field for the number of experts.
        fixed: further fields, so that every layer is an MoE layer and a lone routing weight is 1.
    """

    moe: str
    neurons: str
    experts: str
    fixed: dict[str, Any]


_FAMILIES = {
    "llama": _Family("mixtral", "intermediate_size", "num_local_experts", {"sliding_window": None}),
    "mistral": _Family("mixtral", "intermediate_size", "num_local_experts", {}),
    "qwen3": _Family(
        "qwen3_moe",
        "moe_intermediate_size",
        "num_experts",
        {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
}
DENSE = tuple(_FAMILIES)

# What the two families share; whatever else a dense config holds either follows from these or is checked.
_SHARED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters",
    "tie_word_embeddings", "attention_dropout", "attention_bias", "sliding_window", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip


@torch.no_grad()
def dense_as_experts(model: PreTrainedModel) -> PreTrainedModel:
    """A dense model as an MoE model with one expert per layer and top-1 routing, which computes the same.

    The router's weights are zero; softmax over one expert gives it weight 1 for every token.

    Args:
        model: a causal language model of one of the families ``DENSE``; it is not changed.

    Returns:
        A model of the counterpart family in the same dtype, in eval mode, with weights of its own (stacking gate and
        up copies them, so while both exist they need twice the memory).

    Raises:
        UnsupportedModelError: another family, or a setting that the counterpart cannot express.

    Example::

        view = dense_as_experts(AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M"))
        view.save_pretrained("smollm2-as-experts")  # from here on as any stock MoE model
    """
    config = model.config
    family = _family(config)
    fields = {name: getattr(config, name) for name in _SHARED if hasattr(config, name)}
    fields |= {family.neurons: config.intermediate_size, family.experts: 1, "num_experts_per_tok": 1}
    moe_config = AutoConfig.for_model(family.moe, **(fields | family.fixed))
    view: PreTrainedModel = AutoModelForCausalLM.from_config(moe_config, dtype=model.dtype)
    own = view.state_dict()
    taken = dict(_stacked(model.state_dict(), config.num_hidden_layers))
    routers = [name for name in own if name.endswith(".mlp.gate.weight")]
    taken |= {name: torch.zeros_like(own[name]) for name in routers}
    if taken.keys() != own.keys():
        different = sorted(taken.keys() ^ own.keys())
        raise UnsupportedModelError(
            f"{config.model_type}: {len(different)} weights have no counterpart in {family.moe}, such as {different[0]}"
        )
    view.load_state_dict(taken)
    view.tie_weights()
    view.generation_config = model.generation_config
    view.eval()
    return view


def _family(config: Any) -> _Family:
    """The counterpart of a dense config, or an error that says why there is none."""
    if config.model_type not in _FAMILIES:
        raise UnsupportedModelError(
            f"{config.model_type} cannot be viewed as experts; possible dense families: {', '.join(DENSE)}"
        )
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"hidden_act must be silu for the view as experts, got {config.hidden_act}")
    family = _FAMILIES[config.model_type]
    biases = [name for name in ("mlp_bias", "attention_bias") if getattr(config, name, False)]
    if "mlp_bias" in biases or (biases and family.moe == "mixtral"):
        raise UnsupportedModelError(f"{config.model_type} with {biases[0]} has no counterpart in {family.moe}")
    if len(set(getattr(config, "layer_types", None) or ["full_attention"])) > 1:
        raise UnsupportedModelError(
            f"{config.model_type} with sliding attention in some layers only has no counterpart in {family.moe}"
        )
    return family


def _stacked(weights: dict[str, Tensor], layers: int) -> list[tuple[str, Tensor]]:
    """Dense weights under the MoE model's names, the FFNs stacked as one expert: ``[1, 2C, H]`` and ``[1, H, C]``."""
    out = [(name, value) for name, value in weights.items() if ".mlp." not in name]
    for i in range(layers):
        mlp = f"model.layers.{i}.mlp."
        gate, up, down = (weights[f"{mlp}{part}_proj.weight"] for part in ("gate", "up", "down"))
        out.append((f"{mlp}experts.gate_up_proj", torch.cat([gate, up])[None]))
        out.append((f"{mlp}experts.down_proj", down[None]))
    return out

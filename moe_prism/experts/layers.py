"""Find the routed-expert layers of a loaded transformers model.

Every family that stores its experts as stacked tensors behind transformers' experts interface looks
the same from here; what differs is in four layout flags. Shared experts, routers and everything else
stay as they are. Knows nothing of sub-experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .dense import DENSE

# Each is proven by a parity test with a tiny random model; others behind the same interface are let
# through, since the layout flags describe them completely.
SUPPORTED = (
    "olmoe",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "phimoe",
    "glm4_moe",
    "ernie4_5_moe",
)


@dataclass(frozen=True)
class ExpertLayer:
    """The routed experts of one MoE layer.

    Attributes:
        name: module path in the model, such as ``model.layers.0.mlp.experts``.
        module: the stacked experts; ``gate_up_proj`` and ``down_proj`` in one of the four layouts.
        router: the sibling module that chooses experts; its ``top_k`` is how many.
        num_experts: E.
        num_neurons: C, of one expert.
        hidden_size: H.
        top_k: routed experts of a token.
    """

    name: str
    module: nn.Module
    router: nn.Module
    num_experts: int
    num_neurons: int
    hidden_size: int
    top_k: int


def find_expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """All routed-expert layers in the order of the model's modules.

    Raises:
        UnsupportedModelError: the model has no routed experts, or they are not reachable through the
            stacked experts interface, or they have no gate projection.
    """
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    found = []
    for name, module in model.named_modules():
        if not hasattr(module, "is_transposed") or not hasattr(module, "down_proj"):
            continue
        if not getattr(module, "has_gate", True):
            raise UnsupportedModelError(f"{family}: the experts of {name} have no gate projection. {_supported()}")
        if getattr(module, "has_post_expert_norm", False):
            raise UnsupportedModelError(
                f"{family}: {name} normalises each expert's output, which sub-experts cannot reproduce. {_supported()}"
            )
        found.append(_describe(model, name, module, family))
    if not found:
        hint = f". A dense {family} can be viewed as one expert per layer: experts.dense_as_experts" * (family in DENSE)
        raise UnsupportedModelError(f"{family}: no routed experts that can be split were found. {_supported()}{hint}")
    return found


def _describe(model: nn.Module, name: str, module: nn.Module, family: str) -> ExpertLayer:
    down = module.down_proj
    if not isinstance(down, torch.Tensor) or down.dim() != 3 or not down.is_floating_point():
        raise UnsupportedModelError(
            f"{family}: {name}.down_proj is not a stacked floating-point tensor; load the model unquantised"
        )
    experts, first, second = down.shape
    hidden, neurons = (second, first) if module.is_transposed else (first, second)
    parent = model.get_submodule(name.rpartition(".")[0])
    routers = [
        child
        for child in parent.children()
        if isinstance(getattr(child, "weight", None), torch.Tensor)
        and child.weight.shape == (experts, hidden)
        and isinstance(getattr(child, "top_k", None), int)
    ]
    if len(routers) != 1:
        raise UnsupportedModelError(f"{family}: no router was found beside {name}. {_supported()}")
    return ExpertLayer(name, module, routers[0], experts, neurons, hidden, int(routers[0].top_k))  # type: ignore[arg-type]


def _supported() -> str:
    return (
        f"Supported families: {', '.join(SUPPORTED)}, and others whose experts transformers stores as stacked "
        "gate_up_proj and down_proj. Not reachable that way: dbrx, jetmoe, llama4, longcat_flash, switch_transformers"
    )

"""What an MoE layer is: finding the routed experts of a transformers model, their neurons, their permutation."""

from .dense import DENSE, dense_as_experts
from .layers import SUPPORTED, ExpertLayer, find_expert_layers
from .permutation import down_norms, invert_permutation, permute_neurons

__all__ = [
    "DENSE",
    "SUPPORTED",
    "ExpertLayer",
    "dense_as_experts",
    "down_norms",
    "find_expert_layers",
    "invert_permutation",
    "permute_neurons",
]

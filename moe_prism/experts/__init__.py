"""What an MoE layer is: finding the routed experts of a transformers model, their neurons, their permutation."""

from .layers import SUPPORTED, ExpertLayer, find_expert_layers
from .permutation import down_norms, invert_permutation, permute_neurons

__all__ = [
    "SUPPORTED",
    "ExpertLayer",
    "down_norms",
    "find_expert_layers",
    "invert_permutation",
    "permute_neurons",
]

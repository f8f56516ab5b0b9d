"""Compiled CPU kernels: rows of weights times tokens, and weighted sums of rows.

They know arrays only: no experts, no gates, no torch modules.
"""

from .blocks import gated_blocks
from .digit_blocks import digit_blocks
from .digits import digit_neurons
from .gated import gated_experts
from .neurons import gated_neurons
from .products import multiply_all, multiply_rows
from .sums import add_pairs, add_rows

__all__ = [
    "add_pairs",
    "add_rows",
    "digit_blocks",
    "digit_neurons",
    "gated_blocks",
    "gated_experts",
    "gated_neurons",
    "multiply_all",
    "multiply_rows",
]

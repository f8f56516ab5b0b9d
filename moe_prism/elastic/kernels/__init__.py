"""Compiled CPU kernels: rows of weights times tokens, and weighted sums of rows.

They know arrays only: no experts, no gates, no torch modules.
"""

from .gated import gated_experts
from .products import multiply_rows, multiply_some_rows
from .sums import add_rows, add_some_rows

__all__ = ["add_rows", "add_some_rows", "gated_experts", "multiply_rows", "multiply_some_rows"]

"""moe-prism: a quality dial for stock Mixture-of-Experts language models.

Importing it makes ``experts_implementation="moe_prism"`` known to transformers, without importing
transformers or torch itself; the functions below are loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._on_import import register_when_transformers_is_imported

if TYPE_CHECKING:
    from .elastic import budget, cost_shares, full_budget, load_elastic, routed_experts, set_budget
    from .refactor import Recipe, make_elastic

__version__ = "0.1.0"

__all__ = [
    "Recipe",
    "budget",
    "cost_shares",
    "full_budget",
    "load_elastic",
    "make_elastic",
    "routed_experts",
    "set_budget",
]

_HOME = dict.fromkeys(__all__, "moe_prism.elastic") | {
    "Recipe": "moe_prism.refactor",
    "make_elastic": "moe_prism.refactor",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moe_prism' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


register_when_transformers_is_imported()

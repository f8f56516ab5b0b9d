"""Register our experts function as soon as transformers' experts interface exists.

A command's ``--help`` must not wait for torch, so the package does not import transformers; yet
``import moe_prism`` has to be enough for ``from_pretrained(..., experts_implementation="moe_prism")``.
Knows only the name of the module to wait for.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

IMPLEMENTATION = "moe_prism"
_TARGET = "transformers.integrations.moe"


def register_when_transformers_is_imported() -> None:
    """Register now if the interface is there, otherwise right after it is imported."""
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts)


def _experts(*args: Any, **kwargs: Any) -> Any:
    """Loads the implementation at the first call: while transformers is being imported it cannot be."""
    from .elastic.layer import elastic_experts

    return elastic_experts(*args, **kwargs)


class _Finder(MetaPathFinder):
    """Finds the one module through the other finders, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Executes the module, then registers."""

    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        _register()

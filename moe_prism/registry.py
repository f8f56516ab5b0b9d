"""Names for interchangeable methods: one registry per family (solvers, gates, executors).

Knows nothing of what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar

from .errors import PrismError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a name to a dataclass whose fields are the method's options.

    Example::

        SOLVERS: Registry[Solver] = Registry("solver")

        @SOLVERS.register("greedy")
        @dataclass(frozen=True)
        class Greedy(Solver): ...

        solver = SOLVERS.create("greedy", {})
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator; a name can be taken once."""

        def add(cls: type[T]) -> type[T]:
            if name in self._classes:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._classes[name] = cls
            return cls

        return add

    def create(self, name: str, options: dict[str, Any] | None = None) -> T:
        """An instance with the given options.

        Raises:
            PrismError: unknown name or option, or a value that the class refuses.
        """
        cls = self.get(name)
        options = options or {}
        known = {f.name for f in fields(cls) if f.init} if is_dataclass(cls) else set()
        unknown = sorted(set(options) - known)
        if unknown:
            raise PrismError(
                f"{self.kind} {name!r} has no option {', '.join(map(repr, unknown))}; "
                f"it has: {', '.join(sorted(known)) or 'none'}"
            )
        return cls(**options)

    def get(self, name: str) -> type[T]:
        """The class registered under ``name``; raises PrismError that lists the known names."""
        if name not in self._classes:
            raise PrismError(f"unknown {self.kind} {name!r}; known: {', '.join(self)}")
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))

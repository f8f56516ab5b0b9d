"""What a long benchmark has found so far, in a file, so that it goes on where it was interrupted.

Knows nothing of what is measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.atomic import replace_file


class Partial:
    """Findings by name, written to ``path`` as they come.

    A file that was asked something else (another machine, other options), or that is damaged, is overwritten.
    """

    def __init__(self, path: Path | None, asked: Mapping[str, Any]) -> None:
        """``asked`` is all that findings depend on, plain JSON values; without a path nothing is kept."""
        self._path = path
        self._asked: dict[str, Any] = json.loads(json.dumps(asked))
        self._found: dict[str, Any] = {}
        if path is not None:
            try:
                record = json.loads(path.read_bytes())
                found = record.pop("found")
            except (OSError, ValueError, KeyError, TypeError):
                return
            if record == self._asked and isinstance(found, dict):
                self._found = found

    def __contains__(self, name: str) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> Any:
        return self._found[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._found[name] = value
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self._path, json.dumps({**self._asked, "found": self._found}).encode())

    def finish(self) -> None:
        """Everything is found: the file goes."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

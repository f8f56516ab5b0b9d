"""The command ``moe-prism``: parsing, progress and printing; no logic. One file a command.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys

from ..waiting import brief_waiting


def main() -> None:
    """Entry point; bad input ends with one line on stderr and exit code 2."""
    if sys.argv[1:2] != ["vllm-cost"]:  # which measures what `vllm serve` will do, and that waits as vLLM is used to
        os.environ.update(brief_waiting())
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from ..errors import PrismError
    from .app import app

    try:
        app()
    except PrismError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

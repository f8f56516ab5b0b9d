"""The command ``moe-prism``: parsing, progress and printing; no logic. One file a command.

Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point; bad input ends with one line on stderr and exit code 2."""
    # before torch is imported: threads that spin while they wait starve each other on few or busy cores
    if sys.argv[1:2] != ["vllm-cost"]:  # which measures what `vllm serve` will do, and that waits as vLLM is used to
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from ..errors import PrismError
    from .app import app

    try:
        app()
    except PrismError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

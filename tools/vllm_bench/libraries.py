"""The libraries that vLLM preloads in the processes of its workers, for one that runs an engine of its own.

With torch's OpenMP for everybody, torch, vLLM's kernels and ours share one pool of threads; without it there are two or
three, and a step of one request takes a fifth longer, with the plugin or without (docs/log.md).
"""

from __future__ import annotations

import os
import sys
from glob import glob
from importlib.util import find_spec
from pathlib import Path

_VARIABLE = "LD_PRELOAD"


def preloaded() -> str:
    """The value of the variable; what is set already comes first."""
    found = [os.environ[_VARIABLE]] if os.environ.get(_VARIABLE) else []
    for package, pattern in (("torch", "lib/libgomp*.so*"), ("vllm", "libs/libtcmalloc*.so*")):
        spec = find_spec(package)
        assert spec is not None  # this runs in vLLM's environment
        assert spec.origin is not None
        found += sorted(glob(str(Path(spec.origin).parent / pattern)))[:1]
    return ":".join(found)


def restart_with_them() -> None:
    """Begin this script again with them, unless that has happened."""
    if "libgomp" not in os.environ.get(_VARIABLE, ""):
        os.environ[_VARIABLE] = preloaded()
        os.execv(sys.executable, [sys.executable, *sys.argv])

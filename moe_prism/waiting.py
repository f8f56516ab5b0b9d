"""How the threads of OpenMP wait for work, which must be said before torch is imported. Knows nothing else."""

from __future__ import annotations

import os

# Turns that a waiting thread spins before it sleeps: about half a millisecond, longer than the work between two layers.
SPIN = "30000"
BRIEFLY = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": SPIN}


def brief_waiting() -> dict[str, str]:
    """Environment variables with which waiting threads spin for a moment and then sleep; none if the user set one.

    Waking one takes 50 us, at the begin and at the end of every parallel loop; a thread that spins for long, OpenMP's
    default, keeps a core from whoever else has work. Compiled kernels run on torch's threads, so this is for both.
    """
    return {} if BRIEFLY.keys() & os.environ.keys() else BRIEFLY

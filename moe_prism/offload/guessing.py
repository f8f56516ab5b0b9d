"""Whether a guess of the next layer's blocks is worth its time.

A guess takes the next layer's router and gate, and its reads take part of the processor; all that it can save is the
time that steps wait. So where they hardly wait, nothing is guessed. Knows nothing of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# What the latest step counts in the estimate.
_NEWEST = 0.005
# How fast the estimate of a guess's time rises: the least of late is its own, the rest is what came in between. The
# first one loads its code, and must not be the last.
_RISE = 1.02
# Steps, one of which guesses whatever it seems to be worth, or nothing would be learned any more.
_PROBE = 97
# Waiting of a step, in costs of a guess, from which on guesses are made: they hide about half of it, and reading what
# was guessed takes about as long again (docs/log.md).
_RATIO = 2.0


@dataclass
class Guessing:
    """Keeps count of both.

    Attributes:
        waited: seconds of a step, of late; unknown before the first.
        costs: seconds of a guess, the least of late; 0 before the first.
    """

    waited: float | None = None
    costs: float = 0.0
    _stalled: float = field(default=0.0, init=False, repr=False)
    _steps: int = field(default=0, init=False, repr=False)

    @property
    def worth(self) -> bool:
        """Whether to guess now."""
        return self.waited is None or self.waited >= _RATIO * self.costs or self._steps % _PROBE == 0

    def step(self, stalled: float) -> None:
        """A step begins; steps have waited for so many seconds in all."""
        self._steps += 1
        waited, self._stalled = stalled - self._stalled, stalled
        self.waited = waited if self.waited is None else self.waited + _NEWEST * (waited - self.waited)

    def cost(self, seconds: float) -> None:
        """A guess took so long."""
        self.costs = seconds if not self.costs else min(seconds, _RISE * self.costs)

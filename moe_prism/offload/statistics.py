"""What offloading counts: hits, reads, waiting, and how good guesses are.

Knows nothing of how any of it comes about.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class Statistics:
    """Counts since the start.

    Attributes:
        hits, misses: required blocks that were in memory, or were not, when their step began. One that is still being
            read ahead is a miss.
        blocks_read: whole blocks, from the file.
        bytes_read: from the file, reads that were cancelled included.
        stall_seconds, stall_bytes: time that steps waited with nothing to compute, and what was read meanwhile.
        predicted, predicted_right: blocks named for the next layer, and those of them that were then required.
        foreseeable: required blocks of steps that had a prediction.
        ahead, ahead_right: reads ahead that were begun, and those of them whose block was then required.
        cancelled: reads ahead that ended early because the block was not required.
    """

    hits: int = 0
    misses: int = 0
    blocks_read: int = 0
    bytes_read: int = 0
    stall_seconds: float = 0.0
    stall_bytes: int = 0
    predicted: int = 0
    predicted_right: int = 0
    foreseeable: int = 0
    ahead: int = 0
    ahead_right: int = 0
    cancelled: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of required blocks that were in memory; 0 before any was required."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def precision(self) -> float:
        """Share of predicted blocks that were required."""
        return self.predicted_right / max(1, self.predicted)

    @property
    def recall(self) -> float:
        """Share of required blocks that were predicted."""
        return self.predicted_right / max(1, self.foreseeable)

    @property
    def ahead_precision(self) -> float:
        """Share of the reads ahead whose block was required."""
        return self.ahead_right / max(1, self.ahead)

    @property
    def stall_bandwidth(self) -> float:
        """Bytes per second read while a step waited."""
        return self.stall_bytes / max(1e-9, self.stall_seconds)

    def since(self, before: Statistics) -> Statistics:
        """What was counted after ``before``."""
        return Statistics(**{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)})

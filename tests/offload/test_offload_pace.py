from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.errors import PrismError
from moe_prism.offload.pace import Pace


class FakeMachine:
    """A disk that reads one block at a time and a processor, on a clock of their own; nothing overlaps."""

    def __init__(self, layers: int, read: float, compute: float) -> None:
        self.now, self.stall, self.read, self.compute = 0.0, 0.0, read, compute
        self.pace = Pace(layers, read, lambda: self.stall, lambda: self.now)

    def token(self, rng: np.random.Generator, floor: int, budget: int, here: float) -> tuple[float, float, int]:
        """Run a token of random scores; its time, the least it could have taken, and reads beyond the floor."""
        begin, least, beyond = self.now, 0.0, 0
        for layer in range(self.pace.layers):
            scores = torch.from_numpy(rng.random((1, 16)))
            order = scores[0].argsort(descending=True)
            chosen, sure = torch.zeros(2, 1, 16, dtype=torch.bool)
            chosen[0, order[:budget]], sure[0, order[:floor]] = True, True
            blocks = torch.arange(16)[None] + 16 * layer
            present = set(np.flatnonzero(rng.random(16) < here) + 16 * layer)
            runs, low = self.pace.choose(layer, scores, chosen, sure, blocks, present.__contains__)
            assert not low.any()  # there is no copy
            assert (runs | ~sure).all()  # the floor is never broken
            assert not (runs & ~chosen).any()  # the budget neither
            missing = [b for b in blocks[runs].tolist() if b not in present]
            free = [b for b in blocks[chosen].tolist() if b in present]
            assert set(free) <= set(blocks[runs].tolist())
            must = [b for b in blocks[sure].tolist() if b not in present]
            # What is read beyond the floor is what scores most.
            extra = [b for b in missing if b not in must]
            left = blocks[chosen & ~runs].tolist()
            if extra and left:
                assert min(scores[0, b % 16] for b in extra) >= max(scores[0, b % 16] for b in left)
            self.now += len(missing) * self.read + self.compute
            self.stall += len(missing) * self.read
            least += len(must) * self.read + self.compute
            beyond += len(extra)
        return self.now - begin, least, beyond


@settings(max_examples=40, deadline=None)
@given(
    layers=st.integers(1, 8),
    floor=st.integers(1, 8),
    above=st.integers(0, 8),
    here=st.floats(0, 1),
    allowed=st.floats(0.1, 200),
    seed=st.integers(0, 99),
)
def test_floor_first_then_what_time_allows(
    layers: int, floor: int, above: int, here: float, allowed: float, seed: int
) -> None:
    machine, rng = FakeMachine(layers, read=1.0, compute=0.5), np.random.default_rng(seed)
    machine.pace.seconds = allowed
    for number in range(6):
        took, least, beyond = machine.token(rng, floor, floor + above, here)
        if number:  # nothing is known of the first
            # Floors that are still to come are not known in advance; what is read beyond them fits the time by itself.
            assert took <= max(allowed, least) + min(beyond, 1) * least
            assert layers * 0.5 + beyond <= max(allowed, layers * 0.5) + 1e-6


def test_time_that_is_there_is_used() -> None:
    machine, rng = FakeMachine(4, read=1.0, compute=0.5), np.random.default_rng(0)
    machine.pace.seconds = 14.0  # 12 reads
    reads = [machine.token(rng, 1, 12, 0.0)[0] - 2.0 for _ in range(30)]
    assert np.mean(reads[2:]) == pytest.approx(12, abs=1)
    machine.pace.seconds = 1000.0
    assert machine.token(rng, 1, 12, 0.0)[0] == pytest.approx(4 * 12 + 2)  # all of the budget
    assert machine.pace.mean_budget > 1


def test_times_that_mean_nothing_are_refused() -> None:
    with pytest.raises(PrismError, match="above 0 s"):
        Pace(4, 0.0, lambda: 0.0)

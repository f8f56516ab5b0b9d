from __future__ import annotations

import numpy as np
import pytest

from moe_prism.errors import PrismError
from moe_prism.offload.cache import BlockCache
from moe_prism.offload.eviction import EVICTION, FrequentRecent, LeastFrequentlyUsed


def test_frequent_recent_ranks_by_the_means_it_states() -> None:
    rng = np.random.default_rng(0)
    used = rng.random((40, 12)) < np.linspace(0.05, 0.9, 12)
    rule = FrequentRecent(half_life=9.0, short_life=2.0, recency=0.3)
    for token, row in enumerate(used):
        blocks = np.flatnonzero(row)
        rule.used(blocks, np.ones(len(blocks)) / max(1, len(blocks)), float(token))
    last = max(t for t in range(40) if used[t].any())
    ages = last - np.arange(40)
    chance = np.zeros(12)
    for life, factor in ((9.0, 1.0), (2.0, 0.3)):
        weights = np.where(ages >= 0, 0.5 ** (ages / life), 0) * (1 - 0.5 ** (1 / life))
        chance += factor * weights @ used
    found = rule.keep(np.arange(12))
    assert np.allclose(found / found.max(), chance / chance.max())


@pytest.mark.parametrize("name", ["lru", "lfu-decay", "gate-aware", "frequent-recent"])
def test_blocks_chosen_ahead_for_eviction_are_spared_once_they_are_used(name: str) -> None:
    cache = BlockCache(8, EVICTION.create(name))
    for block in range(8):
        cache.rehearse([block], [1.0], float(block))
    assert cache.rehearse([8], [1.0], 8.0) == 1  # now others are chosen as well
    survivors = [block for block in range(8) if block in cache.place]
    for time, block in enumerate(survivors[1:4], 9):
        assert cache.rehearse([block], [1.0], float(time)) == 0
    for block in (9, 10):
        assert cache.rehearse([block], [1.0], 12.0) == 1
    assert set(survivors[1:4]) <= set(cache.place)


def test_half_lives_that_mean_nothing_are_refused() -> None:
    for options in ({"half_life": 0.0}, {"short_life": -1.0}, {"recency": -0.1}):
        with pytest.raises(PrismError, match="must be"):
            FrequentRecent(**options)
    with pytest.raises(PrismError, match="half-life"):
        LeastFrequentlyUsed(half_life=0.0)

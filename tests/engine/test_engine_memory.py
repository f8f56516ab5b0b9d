"""Runs of places never overlap, and whatever fits by its sum fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_prism.engine.memory import Memory
from moe_prism.errors import PrismError


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(0, 9)), max_size=60))
def test_against_a_plain_array(steps: list[tuple[bool, int, int]]) -> None:
    memory, places = Memory(100), [""] * 100
    lengths: dict[str, int] = {}
    for number, (adds, length, which) in enumerate(steps):
        if not adds:
            if lengths:
                id = sorted(lengths)[which % len(lengths)]
                memory.free(id)
                places = ["" if place == id else place for place in places]
                del lengths[id]
            continue
        id = f"r{number}"
        if length > places.count(""):
            with pytest.raises(PrismError, match=f"{places.count('')} of 100 are free"):
                memory.reserve(id, length)
            continue
        for move in memory.reserve(id, length):  # one after the other, as the engine copies
            moved = places[move.source : move.source + lengths[move.id]]
            assert moved == [move.id] * lengths[move.id]
            assert move.target < move.source
            places[move.source : move.source + len(moved)] = [""] * len(moved)
            assert not any(places[move.target : move.target + len(moved)])
            places[move.target : move.target + len(moved)] = moved
        start = memory.start(id)
        assert places[start : start + length] == [""] * length
        places[start : start + length] = [id] * length
        lengths[id] = length
        assert memory.used == sum(lengths.values())
        for other in lengths:
            assert places.index(other) == memory.start(other)

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_prism.errors import PrismError
from moe_prism.vllm_plugin.arguments import Quality, quality_of


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, Quality(16, 16)),
        ({"session_id": "somebody else's"}, Quality(16, 16)),
        ({"k_active": 9}, Quality(9, 9)),
        ({"k_min": 4}, Quality(4, 16)),
        ({"k_min": 4, "k_active": 9, "ttft_ms": 300, "tpot_ms": 50.5}, Quality(4, 9, 300.0, 50.5)),
    ],
)
def test_what_a_request_asks_for(given: dict[str, Any] | None, expected: Quality) -> None:
    assert quality_of(given, full_budget=16, floor=16) == expected


def test_the_servers_floor_is_for_those_who_name_nothing() -> None:
    assert quality_of(None, 16, floor=3) == Quality(3, 16)
    assert quality_of({"k_active": 9}, 16, floor=3) == Quality(9, 9)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"k_active": 17}, r"k_active must be from 1 to 16 \(full budget\), got 17"),
        ({"k_min": 0}, "k_min must be from 1 to 16"),
        ({"k_active": "9"}, "k_active must be a whole number from 1 to 16.*'9'"),
        ({"k_active": 9.0}, "whole number"),
        ({"k_active": True}, "whole number"),
        ({"k_active": [9]}, "whole number"),
        ({"k_min": 9, "k_active": 4}, "k_min must be from 1 to k_active = 4, got 9"),
        ({"ttft_ms": 0}, "ttft_ms must be above 0"),
        ({"tpot_ms": float("nan")}, "tpot_ms must be above 0"),
        ({"tpot_ms": "fast"}, "tpot_ms must be above 0"),
    ],
)
def test_impossible_values_are_named(given: dict[str, Any], words: str) -> None:
    with pytest.raises(PrismError, match=words):
        quality_of(given, 16, 16)


@given(
    st.dictionaries(
        st.sampled_from(["k_min", "k_active", "ttft_ms", "tpot_ms"]),
        st.one_of(st.integers(-3, 40), st.floats(), st.sampled_from(["9", "low"]), st.none(), st.booleans()),
    )
)
def test_whatever_is_taken_can_be_served(given: dict[str, Any]) -> None:
    try:
        found = quality_of(given, 32, 32)
    except PrismError:
        return
    assert 1 <= found.k_min <= found.k_active <= 32
    assert all(value is None or value > 0 for value in (found.ttft_ms, found.tpot_ms))

from __future__ import annotations

import pytest

from moe_prism.serving.admission import ServedModel, budgets
from moe_prism.serving.errors import ApiError
from moe_prism.serving.schema import Quality

MODEL = ServedModel("m", None, 16, 100, 96, (2,), k_min=5, created=0, points=None, named={})


@pytest.mark.parametrize(
    ("asked", "expected"),
    [({}, (5, 16)), ({"k_min": 9}, (9, 16)), ({"k_active": 12}, (12, 12)), ({"k_active": 3}, (3, 3)),
     ({"k_min": 9, "k_active": 12}, (9, 12)), ({"k_min": 1}, (1, 16)), ({"k_min": 16}, (16, 16))],
)  # fmt: skip
def test_floor_and_most_wanted_budget(asked: dict, expected: tuple[int, int]) -> None:
    assert budgets(MODEL, Quality(**asked)) == expected


@pytest.mark.parametrize("asked", [{"k_min": 17}, {"k_active": 0}, {"k_min": 13, "k_active": 12}])
def test_impossible_budgets(asked: dict) -> None:
    with pytest.raises(ApiError) as refused:
        budgets(MODEL, Quality(**asked))
    assert refused.value.status_code == 400

"""The dial with layer budgets: every way of setting budgets means the same, and full stays full."""

from __future__ import annotations

import pytest
import torch

from moe_prism.elastic.dial import Dial, spread_table
from moe_prism.elastic.plan import Plan

CPU = torch.device("cpu")
TABLE = [[1, 1], [1, 3], [3, 3], [4, 4]]


@pytest.fixture
def dial() -> Dial:
    dial = Dial(4)
    dial.spread = spread_table(TABLE)
    return dial


@pytest.mark.parametrize("layer", [0, 1])
def test_one_number_rows_and_a_filled_buffer_agree(dial: Dial, layer: int) -> None:
    expected = torch.tensor([TABLE[k - 1][layer] for k in (2, 2, 3, 3)])
    dial.rows = torch.tensor([2, 3])
    of_rows = dial.step(4, CPU, layer)
    dial.rows = None
    dial.fill([2, 2, 3, 3])
    filled = dial.step(4, CPU, layer)
    dial.fill(None)
    for step in (of_rows, filled):
        assert step is not None
        assert torch.equal(step.k_active, expected)
        assert step.pairs == int(expected.sum())
    dial.k_active = 2
    alone = dial.step(3, CPU, layer)
    assert alone is not None
    assert alone.k_active.tolist() == [TABLE[1][layer]] * 3


def test_what_a_step_asks_for_is_found_once_and_follows_every_change() -> None:
    dial = Dial(4)
    dial.plan = Plan([2, 3, 4, 4], 6)
    for budgets in ([1, 2], [3, 1], [3, 1]):
        dial.fill(budgets)
        steps = [dial.step(2, CPU, layer) for layer in range(3)]
        assert all(step is steps[0] for step in steps)
        assert steps[0] is not None
        assert steps[0].k_active.tolist() == budgets
        looked, neurons = dial.spend(steps[0])
        assert neurons is not None
        assert dial.spend(steps[0])[1] is neurons
        assert looked.k_active.tolist() == dial.plan.scan[torch.tensor(budgets)].tolist()
        assert neurons.tolist() == dial.plan.neurons[torch.tensor(budgets)].tolist()
    dial.plan = Plan([1, 3, 4, 4], 6)
    assert steps[0] is not None
    assert dial.spend(steps[0])[0].k_active.tolist() == [4, 1]
    dial.k_min = 1
    floored = dial.step(2, CPU, 0)
    assert floored is not None
    assert floored.k_min is not None
    assert dial.spend(floored)[0].k_min is not None


def test_floors_are_spread_like_budgets(dial: Dial) -> None:
    dial.k_active, dial.k_min = 3, 2
    for layer in (0, 1):
        step = dial.step(2, CPU, layer)
        assert step is not None
        assert step.k_min is not None
        assert step.k_min.tolist() == [TABLE[1][layer]] * 2
        assert step.k_active.tolist() == [TABLE[2][layer]] * 2


def test_a_layer_that_runs_everything_takes_its_own_path(dial: Dial) -> None:
    assert dial.step(2, CPU, 0) is None  # full budget
    dial.spread = spread_table([[1, 1], [1, 3], [2, 4], [4, 4]])
    dial.k_active = 3
    assert dial.step(2, CPU, 0) is not None
    assert dial.step(2, CPU, 1) is None

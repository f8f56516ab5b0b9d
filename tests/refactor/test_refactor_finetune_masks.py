"""Straight-through choices against finite differences of the smooth choice that they differentiate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_prism.refactor.finetune_masks import smooth_choice, straight_through, threshold_between, through_smooth

TEMPERATURE = 0.5


def conserved_threshold(scores: Tensor, total: float) -> Tensor:
    """By bisection: the threshold at which the smooth choices of a row add up to ``total``."""
    low, high = scores.amin(1, keepdim=True) - 20, scores.amax(1, keepdim=True) + 20
    for _ in range(100):
        middle = (low + high) / 2
        more = smooth_choice(scores, middle, TEMPERATURE).sum(1, keepdim=True) > total
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return (low + high) / 2


@pytest.mark.parametrize("total", [1.0, 4.0, 6.5])
def test_the_gradient_is_that_of_the_smooth_choice_of_a_fixed_sum(total: float) -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 9, dtype=torch.float64)
    worth = torch.randn(3, 9, dtype=torch.float64)

    def value(at: Tensor) -> Tensor:
        return (smooth_choice(at, conserved_threshold(at, total), TEMPERATURE) * worth).sum()

    found = through_smooth(scores, conserved_threshold(scores, total), TEMPERATURE, worth)
    step = 1e-5
    for i in range(scores.numel()):
        change = torch.zeros_like(scores).view(-1)
        change[i] = step
        change = change.view_as(scores)
        expected = (value(scores + change) - value(scores - change)) / (2 * step)
        assert found.view(-1)[i] == pytest.approx(float(expected), abs=1e-7)


def test_values_are_the_choice_and_the_gradient_is_at_the_threshold_between() -> None:
    torch.manual_seed(0)
    scores = torch.randn(4, 10).requires_grad_()
    chosen = torch.zeros(4, 10, dtype=torch.bool).scatter_(1, scores.topk(3, dim=1).indices, True)
    worth = torch.randn(4, 10)
    out = straight_through(scores, chosen, TEMPERATURE)
    assert torch.equal(out, chosen.float())
    (out * worth).sum().backward()
    by_size = scores.detach().sort(dim=1, descending=True).values
    threshold = (by_size[:, 2:3] + by_size[:, 3:4]) / 2
    torch.testing.assert_close(threshold_between(scores.detach(), chosen), threshold)
    torch.testing.assert_close(scores.grad, through_smooth(scores.detach(), threshold, TEMPERATURE, worth))


def test_what_is_worth_more_than_its_neighbours_is_pulled_in_and_nothing_is_gained_over_all() -> None:
    scores = torch.tensor([[0.1, 0.0, -0.1, -5.0]]).requires_grad_()
    worth = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    (straight_through(scores, scores > 0.05, TEMPERATURE) * worth).sum().backward()
    assert scores.grad is not None
    assert scores.grad[0, 2] > 0 > scores.grad[0, 0]
    assert abs(float(scores.grad[0, 3])) < 1e-3  # far from the threshold
    assert float(scores.grad.sum()) == pytest.approx(0, abs=1e-6)


def test_impossible_ones_and_full_rows_have_no_gradient() -> None:
    scores = torch.tensor([[1.0, -torch.inf, 0.5], [1.0, 2.0, 3.0]]).requires_grad_()
    chosen = torch.tensor([[True, False, False], [True, True, True]])
    (straight_through(scores, chosen, TEMPERATURE) * torch.tensor([1.0, 5.0, -1.0])).sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert scores.grad[0, 1] == 0

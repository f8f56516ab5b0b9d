"""Draws against the distribution in NumPy, at every temperature, and greedy tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_prism.engine.requests import Sampling
from moe_prism.engine.sampling import Sampler, choose

LOGITS = torch.tensor([1.0, 3.0, 2.5, -1.0, float("-inf")])


def frequencies(sampling: Sampling, count: int = 4000) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.bincount([sampler.draw(LOGITS) for _ in range(count)], minlength=len(LOGITS)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 1e30])
def test_draws_follow_the_softmax(temperature: float) -> None:
    wanted = np.exp(LOGITS.double().numpy() / temperature)
    wanted /= wanted.sum()
    assert frequencies(Sampling(temperature, seed=3)) == pytest.approx(wanted, abs=0.03)


def test_top_p_leaves_the_most_likely() -> None:
    found = frequencies(Sampling(1.0, top_p=0.6, seed=3))  # the first has 0.57, the first two 0.91
    assert found[[0, 3, 4]].sum() == 0
    assert found[1] == pytest.approx(np.exp(3) / (np.exp(3) + np.exp(2.5)), abs=0.03)


@pytest.mark.parametrize("temperature", [1e-5, 1e-40, 1e-70, 5e-324])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_no_temperature_is_too_low(temperature: float, top_p: float) -> None:
    sampler = Sampler(Sampling(temperature, top_p, seed=1))
    assert not sampler.greedy
    for scale in (1.0, 1e30):
        assert {sampler.draw(LOGITS * scale) for _ in range(20)} == {1}
    assert choose([sampler], LOGITS[None])[0].token == 1

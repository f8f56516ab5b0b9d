"""Norms by the compiled kernel against the family's own."""

from __future__ import annotations

import copy

import pytest
import torch
from making import logits
from tiny import FAMILIES, tiny_model
from torch import Tensor, nn

from moe_prism.elastic.norms import is_usual_norm, use_fast_norms


class Usual(nn.Module):
    def __init__(self, size: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5, False)
        self.variance_epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(
            x.dtype
        )


class RoundedOnce(Usual):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * wide * scale).to(x.dtype)


class FromOne(Usual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x) / self.weight


def test_only_the_usual_norm_is_taken() -> None:
    assert is_usual_norm(Usual(48))
    assert not is_usual_norm(RoundedOnce(48))
    assert not is_usual_norm(FromOne(48))
    assert not is_usual_norm(nn.LayerNorm(48))
    assert not is_usual_norm(nn.Embedding(48, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 48), (3, 7, 48), (2, 400, 48), (48,), (0, 48), (1, 2048)])
def test_it_gives_what_the_module_gives(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = Usual(shape[-1]).to(dtype)
    fast = copy.deepcopy(plain)
    use_fast_norms(nn.Sequential(fast))
    x = (torch.randn(shape) * 3).to(dtype)
    found, expected = fast(x), plain(x)
    assert found.dtype == dtype
    assert found.shape == expected.shape
    # sums in another order: a number near the middle of two may be rounded to the other
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    assert (found != expected).float().mean() < 0.01 or dtype == torch.float32 or not x.numel()


def test_other_inputs_go_the_modules_way() -> None:
    fast = Usual(32)
    use_fast_norms(fast)
    strided = torch.randn(32, 5).t()
    torch.testing.assert_close(fast(strided), Usual.forward(fast, strided))
    x = torch.randn(2, 32, requires_grad=True)
    fast(x).sum().backward()
    assert x.grad is not None
    half = torch.randn(2, 32).half()
    assert torch.equal(fast(half), Usual.forward(fast, half))  # weights of another dtype
    for value in (float("nan"), float("inf")):
        x = torch.randn(2, 32)
        x[1, 3] = value
        assert torch.equal(fast(x).isnan(), Usual.forward(fast, x).isnan())
    moved = copy.deepcopy(fast)
    moved.weight.mul_(2)
    x = torch.randn(2, 32)
    torch.testing.assert_close(moved(x), 2 * fast(x))  # a copy reads its own weight


@pytest.mark.parametrize("family", FAMILIES)
def test_models_stay_the_same(family: str) -> None:
    model = tiny_model(family)
    expected = logits(model)
    use_fast_norms(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)

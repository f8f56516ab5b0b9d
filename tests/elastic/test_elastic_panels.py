"""Experts in panels against ``reference``, and what must not depend on company."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moe_prism.elastic.executors import EXECUTORS
from moe_prism.elastic.executors.panels import Panels, PanelsExecutor, panels_suit, run_whole
from moe_prism.elastic.kernels.dots import has_products_of_pairs
from moe_prism.elastic.selection import Selection, gather_selection, whole_experts

E, K = 5, 3
needs_pairs = pytest.mark.skipif(
    not has_products_of_pairs(), reason="this CPU has no products of bfloat16 pairs (AVX512-BF16)"
)


class Experts(nn.Module):
    """Plain stacked experts of ``n`` sub-experts of ``size`` neurons, values as bfloat16 stores them."""

    is_transposed, is_concatenated, has_gate, has_bias, has_post_expert_norm = False, True, True, False, False

    def __init__(self, hidden: int, size: int, n: int, seed: int = 0) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(seed)
        self.num_experts = E
        gate_up = torch.randn(E, 2 * size * n, hidden, generator=made) * 0.2
        down = torch.randn(E, hidden, size * n, generator=made) * 0.2
        self.panels = Panels.of(gate_up.bfloat16(), down.bfloat16(), n)
        self.gate_up_proj = nn.Parameter(gate_up.bfloat16().float(), requires_grad=False)
        self.down_proj = nn.Parameter(down.bfloat16().float(), requires_grad=False)
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        applied: Tensor = self.act_fn(gate) * up
        return applied


def tokens(count: int, hidden: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of bfloat16 values, and their routing."""
    made = torch.Generator().manual_seed(seed)
    x, weights = torch.randn(count, hidden, generator=made).bfloat16(), torch.rand(count, K, generator=made)
    return x, weights, torch.rand(count, E, generator=made).topk(K).indices


def near(found: Tensor, expected: Tensor) -> None:
    """Equal but for activations and outputs rounded to bfloat16."""
    assert found.dtype == torch.bfloat16
    scale = expected.abs().max().clamp(min=1e-6)
    torch.testing.assert_close(found.float() / scale, expected / scale, atol=1.5e-2, rtol=0)


@needs_pairs
@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 9),
    st.sampled_from([64, 128, 192]),
    st.sampled_from([22, 32, 48, 64]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 1000),
)
def test_any_selection_gives_what_reference_gives(count: int, hidden: int, size: int, n: int, seed: int) -> None:
    experts = Experts(hidden, size, n)
    x, weights, index = tokens(count, hidden, seed)
    made = torch.Generator().manual_seed(seed)
    chosen = torch.rand(count, K, n, generator=made) < torch.rand(count, 1, 1, generator=made)  # some run nothing
    selection = gather_selection(chosen, index, weights)
    found = PanelsExecutor().run(experts, x, selection, n)
    if len(selection.weight):
        near(found, EXECUTORS.create("reference").run(experts, x.float(), selection, n))
    else:
        assert not found.any()


@needs_pairs
def test_many_tokens_of_one_sub_expert_and_few_of_others() -> None:
    experts = Experts(64, 32, 2)
    x, weights, _ = tokens(150, 64)
    index = torch.zeros(150, K, dtype=torch.int64)
    index[:, 1], index[:, 2] = 1 + torch.arange(150) % 3, 4
    chosen = torch.zeros(150, K, 2, dtype=torch.bool)
    chosen[:, 0, 1] = chosen[::7, 1] = True
    selection = gather_selection(chosen, index, weights)
    found = PanelsExecutor().run(experts, x, selection, 2)
    near(found, EXECUTORS.create("reference").run(experts, x.float(), selection, 2))


@needs_pairs
def test_a_token_gets_bit_for_bit_what_it_gets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, executor = Experts(128, 48, 4), PanelsExecutor()
    x, weights, index = tokens(11, 128)
    chosen = torch.zeros(11, K * 4, dtype=torch.bool)
    for t, count in enumerate([1, 12, 5, 5, 12, 3, 7, 12, 12, 2, 9]):
        chosen[t, torch.randperm(12, generator=torch.Generator().manual_seed(t))[:count]] = True
    chosen = chosen.view(11, K, 4)
    together = executor.run(experts, x, gather_selection(chosen, index, weights), 4)
    whole = executor.run(experts, x, whole_experts(index, weights, None), 1)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        for t in range(11):
            one = slice(t, t + 1)
            alone = executor.run(experts, x[one], gather_selection(chosen[one], index[one], weights[one]), 4)
            assert torch.equal(together[one], alone)
            if chosen[t].all():  # whole experts, or all sub-experts of them: the same sums
                assert torch.equal(whole[one], alone)


@needs_pairs
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_whole_experts_in_one_call(threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    experts = Experts(64, 48, 2)
    for count in (0, 1, 17):
        x, weights, index = tokens(count, 64)
        expected = PanelsExecutor().run(experts, x, whole_experts(index, weights, None), 1)
        # as a router's result may lie: not contiguous
        strided = torch.stack([index, index], dim=2).to(dtype)[:, :, 1], torch.stack([weights, weights], dim=2)[:, :, 0]
        assert torch.equal(run_whole(experts.panels, x, *strided), expected)


@needs_pairs
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value: float) -> None:
    experts = Experts(64, 32, 2)
    x, weights, index = tokens(6, 64)
    good = PanelsExecutor().run(experts, x, whole_experts(index, weights, None), 1)
    x[2, 5] = value
    found = PanelsExecutor().run(experts, x, whole_experts(index, weights, None), 1)
    assert not found[2].isfinite().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(found[others], good[others])


@needs_pairs
def test_it_is_as_exact_as_torch_in_bfloat16() -> None:
    experts = Experts(256, 64, 2)
    x, weights, index = tokens(40, 256)
    selection = whole_experts(index, weights, None)
    exact = EXECUTORS.create("reference").run(experts, x.float(), selection, 1)
    found = PanelsExecutor().run(experts, x, selection, 1).float()
    experts.bfloat16()
    usual = EXECUTORS.create("reference").run(experts, x, selection, 1).float()
    assert (found - exact).norm() < 1.2 * (usual - exact).norm()


def test_panels_hold_every_weight_once() -> None:
    gate_up = torch.arange(2 * 2 * 64 * 64).view(2, 128, 64).float().bfloat16()
    down = torch.arange(2 * 64 * 64).view(2, 64, 64).float().bfloat16()
    panels = Panels.of(gate_up, down, 2)
    assert panels.gate_up.shape == (4, 32, 64)
    assert panels.down.shape == (4, 1, 16, 64)

    def value(word: Any, upper: int) -> float:
        return float((np.uint32(word) >> (16 * upper) << 16).astype(np.uint32).view(np.float32))

    # expert 1, sub-expert 1, neuron 3 of it: neuron 35 of the expert
    assert value(panels.gate_up[3, 10, 3], 1) == gate_up[1, 35, 21]
    assert value(panels.gate_up[3, 10, 32 + 3], 0) == gate_up[1, 64 + 35, 20]
    assert value(panels.down[3, 0, 1, 9], 1) == down[1, 9, 35]


def test_it_refuses_what_it_cannot_run() -> None:
    executor, x = PanelsExecutor(), torch.zeros(1, 64, dtype=torch.bfloat16)
    assert "not laid out" in str(executor.refusal(nn.Module(), x))
    module: Any = SimpleNamespace(panels=object())
    assert executor.refusal(module, x) is None
    assert "torch.float32" in str(executor.refusal(module, x.float()))
    assert "no gradients" in str(executor.refusal(module, x.requires_grad_()))


@pytest.mark.parametrize(
    ("dtype", "hidden", "neurons", "n", "fits"),
    [
        (torch.bfloat16, 1024, 512, 4, True),
        (torch.bfloat16, 128, 192, 8, True),
        (torch.bfloat16, 128, 192, 16, False),
        (torch.bfloat16, 96, 512, 4, False),
        (torch.float32, 1024, 512, 4, False),
    ],
)
def test_what_suits_panels(dtype: torch.dtype, hidden: int, neurons: int, n: int, fits: bool) -> None:
    assert panels_suit(dtype, hidden, neurons, n) is (fits and has_products_of_pairs())


def test_a_selection_of_nothing_is_zeros() -> None:
    if not has_products_of_pairs():
        pytest.skip("this CPU has no products of bfloat16 pairs (AVX512-BF16)")
    none = torch.empty(0, dtype=torch.int64)
    found = PanelsExecutor().run(Experts(64, 32, 2), tokens(3, 64)[0], Selection(none, none, none, torch.empty(0)), 2)
    assert found.shape == (3, 64)
    assert not found.any()

"""vLLM's kernel as an executor, against ``reference``."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests")

import vllm_live  # noqa: F401 - settings that vLLM reads when it is imported
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.elastic.executors import EXECUTORS
from moe_prism.elastic.selection import gather_selection, whole_experts
from moe_prism.vllm_plugin.cpu_kernel import VirtualExperts, VllmCpuExecutor, all_sub_experts, fits, padded_calls
from moe_prism.vllm_plugin.stacked import StackedExperts

E, H, K = 6, 32, 3


def module(size: int, n: int, dtype: torch.dtype = torch.float32) -> StackedExperts:
    torch.manual_seed(0)
    gate_up, down = torch.randn(E, 2 * size * n, H) * 0.3, torch.randn(E, H, size * n) * 0.3
    made = StackedExperts(gate_up.to(dtype), down.to(dtype))
    made.virtual = VirtualExperts.of(made.gate_up_proj, made.down_proj, n, "vec")
    return made


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.sampled_from([32, 48]), st.sampled_from([2, 4]), st.integers(0, 1000))
def test_any_selection_gives_what_reference_gives(tokens: int, size: int, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    experts = module(size, n)
    x, weights = torch.randn(tokens, H), torch.rand(tokens, K)
    index = torch.stack([torch.randperm(E)[:K] for _ in range(tokens)])
    chosen = torch.rand(tokens, K, n) < torch.rand(tokens, 1, 1)  # some tokens may run nothing
    selection = gather_selection(chosen, index, weights)
    found = VllmCpuExecutor().run(experts, x, selection, n)
    expected = EXECUTORS.create("reference").run(experts, x, selection, n)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_gets_what_it_gets_alone(dtype: torch.dtype) -> None:
    experts = module(32, 4, dtype)
    x, weights = torch.randn(7, H).to(dtype), torch.rand(7, K)
    index = torch.stack([torch.randperm(E)[:K] for _ in range(7)])
    chosen = torch.zeros(7, K * 4, dtype=torch.bool)
    for t, count in enumerate([1, 12, 5, 5, 12, 3, 7]):
        chosen[t, torch.randperm(12)[:count]] = True
    chosen = chosen.view(7, K, 4)
    together = VllmCpuExecutor().run(experts, x, gather_selection(chosen, index, weights), 4)
    for t in range(7):
        one = slice(t, t + 1)
        alone = VllmCpuExecutor().run(experts, x[one], gather_selection(chosen[one], index[one], weights[one]), 4)
        assert torch.equal(together[one], alone)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=40), st.floats(1.0, 4.0), st.integers(0, 1000))
def test_calls_hold_every_pair_once_and_little_else(counts: list[int], most: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    token = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    sub_expert, weight = rng.integers(0, 99, len(token)), rng.random(len(token)).astype(np.float32) + 0.1
    calls = padded_calls(token, sub_expert, weight, len(counts), most)
    assert sorted(row for call in calls for row in call.rows) == [t for t, count in enumerate(counts) if count]
    for call in calls:
        mine = [counts[row] for row in call.rows]
        assert call.ids.shape == call.weights.shape == (len(mine), max(mine))
        assert min(mine) == max(mine) or call.ids.size <= most * sum(mine) + 1e-6
        for row, ids, weights in zip(call.rows, call.ids, call.weights, strict=True):
            counted = weights > 0
            pairs = zip(sub_expert[token == row], weight[token == row], strict=True)
            assert sorted(zip(ids[counted], weights[counted], strict=True)) == sorted(pairs)
            assert set(ids) == set(sub_expert[token == row])  # nothing else is read
    if most >= max(counts, default=1):
        assert len(calls) <= 1


def test_all_sub_experts_are_full_budget() -> None:
    experts = module(32, 4)
    x, weights = torch.randn(5, H), torch.rand(5, K)
    index = torch.stack([torch.randperm(E)[:K] for _ in range(5)])
    found = experts.virtual.run(x, *all_sub_experts(weights, index, 4))
    expected = EXECUTORS.create("reference").run(experts, x, whole_experts(index, weights, None), 1)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("neurons", "n", "expected"), [(512, 4, True), (192, 8, True), (192, 16, False), (64, 4, False)]
)
def test_what_fits_the_kernels_vectors(neurons: int, n: int, expected: bool) -> None:
    assert fits(neurons, n) is expected

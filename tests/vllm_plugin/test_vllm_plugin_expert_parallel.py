"""What a process runs of a selection, where experts are spread over processes; without vLLM."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_prism.elastic.executors import EXECUTORS, choose_executor
from moe_prism.elastic.selection import Selection, gather_selection
from moe_prism.vllm_plugin.expert_parallel import NAME, AllExperts, local_pairs
from moe_prism.vllm_plugin.stacked import StackedExperts

E, H, C, K, N = 6, 8, 16, 3, 4
# as vLLM places them: in runs of equal length, of different length, and in turn
PLACES = ([[0, 1, 2], [3, 4, 5]], [[0, 1, 2, 3], [4, 5]], [[0, 2, 4], [1, 3, 5]])


def expert_map(mine: list[int]) -> torch.Tensor:
    found = torch.full((E,), -1, dtype=torch.int32)
    found[mine] = torch.arange(len(mine), dtype=torch.int32)
    return found


def some(tokens: int, n: int) -> tuple[torch.Tensor, Selection]:
    index = torch.stack([torch.randperm(E)[:K] for _ in range(tokens)])
    chosen = torch.rand(tokens, K, n) < torch.rand(tokens, 1, 1)
    return torch.randn(tokens, H), gather_selection(chosen, index, torch.rand(tokens, K))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.sampled_from([1, N]), st.sampled_from(PLACES), st.integers(0, 1000))
def test_what_the_processes_run_adds_up_to_the_whole(tokens: int, n: int, places: list[list[int]], seed: int) -> None:
    torch.manual_seed(seed)
    gate_up, down = torch.randn(E, 2 * C, H), torch.randn(E, H, C)
    x, selection = some(tokens, n)
    expected = EXECUTORS.create("reference").run(StackedExperts(gate_up, down), x, selection, n)
    found = torch.zeros_like(x)
    for mine in places:
        everything = AllExperts(StackedExperts(gate_up[mine].clone(), down[mine].clone()), expert_map(mine))
        executor = choose_executor(NAME, everything, x, 1.0, "parts", n)
        found += executor.run(everything, x, selection, n)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_pairs_stay_in_the_order_of_sub_experts() -> None:
    torch.manual_seed(0)
    _, selection = some(7, N)
    for places in PLACES:
        parts = [local_pairs(selection, expert_map(mine).long(), N) for mine in places]
        assert sum(len(part.token) for part in parts) == len(selection.token)
        for mine, part in zip(places, parts, strict=True):
            assert part.sub_expert.tolist() == sorted(part.sub_expert.tolist())
            assert part.sub_expert.max() < len(mine) * N


def test_a_process_without_any_of_the_experts_adds_nothing() -> None:
    everything = AllExperts(StackedExperts(torch.randn(1, 2 * C, H), torch.randn(1, H, C)), expert_map([5]))
    selection = gather_selection(torch.ones(2, K, N, dtype=torch.bool), torch.tensor([[0, 1, 2]] * 2), torch.rand(2, K))
    out = EXECUTORS.create(NAME).run(everything, torch.randn(2, H), selection, N)
    assert torch.equal(out, torch.zeros(2, H))


def test_whole_modules_are_none_of_its_business() -> None:
    module = StackedExperts(torch.randn(E, 2 * C, H), torch.randn(E, H, C))
    with pytest.raises(Exception, match="all of its experts are here"):
        choose_executor(NAME, module, torch.randn(2, H), 1.0)

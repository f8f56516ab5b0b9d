"""The collectives that vLLM lacks on CPUs, between processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests")

import vllm_live  # noqa: F401 - settings that vLLM reads when it is imported
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

from moe_prism.vllm_plugin.cpu_collectives import gather_rows, install, scatter_sums
from moe_prism.vllm_plugin.exchange import NOBODY, budgets_of_all

pytestmark = pytest.mark.timeout(300)
SIZES = [3, 1, 4]


def of_rank(rank: int) -> list[torch.Tensor]:
    torch.manual_seed(rank)
    rows = SIZES[rank]
    return [torch.randn(rows, 5), torch.randn(rows, 6).bfloat16(), torch.randint(0, 99, (rows,), dtype=torch.int32)]


def partial_sums(rank: int, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(rank + 10)
    return torch.randn(sum(SIZES), 5).to(dtype)


def one_process(rank: int, meeting: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=len(SIZES))
    for number, mine in enumerate(of_rank(rank)):
        expected = torch.cat([of_rank(other)[number] for other in range(len(SIZES))])
        assert torch.equal(gather_rows(mine, SIZES, dist.group.WORLD), expected)
    begin = sum(SIZES[:rank])
    for dtype in (torch.float32, torch.bfloat16):
        every = torch.stack([partial_sums(other, dtype) for other in range(len(SIZES))])
        expected = every.float().sum(dim=0).to(dtype)[begin : begin + SIZES[rank]]
        found = scatter_sums(partial_sums(rank, dtype), SIZES, rank, dist.group.WORLD)
        assert torch.equal(found, expected)
    dist.destroy_process_group()


@pytest.mark.long
def test_ranks_of_different_sizes_meet_and_part(tmp_path: Path) -> None:
    mp.spawn(one_process, args=(str(tmp_path / "meeting"),), nprocs=len(SIZES))


def test_vllm_has_neither_of_its_own() -> None:
    """A vLLM that does needs no module ``cpu_collectives``."""
    base = DeviceCommunicatorBase
    ours = "moe_prism.vllm_plugin.cpu_collectives"
    for name in ("all_gatherv", "reduce_scatterv"):
        assert getattr(CpuCommunicator, name).__module__ in (base.__module__, ours)
        with pytest.raises(NotImplementedError):
            getattr(base, name)(None, torch.zeros(1))
    install()
    for name in ("all_gatherv", "reduce_scatterv"):
        assert getattr(CpuCommunicator, name).__module__ == ours


def test_dummy_tokens_cost_little_and_change_nobodys_path() -> None:
    def found(*budgets: int) -> list[int] | None:
        filled = budgets_of_all(torch.tensor(budgets, dtype=torch.int32), 16)
        return None if filled is None else filled.tolist()

    assert found(9, 16, NOBODY, 3) == [9, 16, 1, 3]
    assert found(16, 16, NOBODY) is None  # everybody who is there runs everything
    assert found(16, 16) is None
    assert found(NOBODY, NOBODY) is None  # a dummy step of all ranks, by which vLLM finds out what the original needs
    assert found(9) == [9]

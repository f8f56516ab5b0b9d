"""Two collectives that vLLM 0.32 lacks on CPUs, and without which no MoE model is data parallel there.

Its layers exchange tokens by a gather and a scatter of different numbers of rows, which its communicator for CPUs does
not have (``NotImplementedError``). Bytes are exchanged, and sums are in fp32 in the order of ranks: gloo does not know
every dtype. Knows nothing of what is exchanged.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.device_communicators.base_device_communicator import DeviceCommunicatorBase
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


def install() -> None:
    """Give vLLM's communicator for CPUs what it lacks; a later vLLM's own is left alone."""
    for ours in (all_gatherv, reduce_scatterv):
        name = ours.__name__
        if getattr(CpuCommunicator, name) is getattr(DeviceCommunicatorBase, name):
            setattr(CpuCommunicator, name, ours)


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """As vLLM's for GPUs: the ranks' rows one after the other, of a tensor or of each of a list."""
    tensors = input_ if isinstance(input_, list) else [input_]
    rows = [len(tensors[0])] * self.world_size if sizes is None else sizes
    found = [gather_rows(tensor, rows, self.device_group) for tensor in tensors]
    return found if isinstance(input_, list) else found[0]


def reduce_scatterv(self: Any, input_: Tensor, dim: int = -1, sizes: list[int] | None = None) -> Tensor:
    """As vLLM's for GPUs: this rank's rows of the sum of all ranks' tensors; ``dim`` is 0 wherever it is called."""
    rows = [len(input_) // self.world_size] * self.world_size if sizes is None else sizes
    return scatter_sums(input_, rows, self.rank_in_group, self.device_group)


def gather_rows(tensor: Tensor, sizes: list[int], group: Any) -> Tensor:
    """The ranks' rows one after the other, in the order of ranks.

    Args:
        tensor: this rank's.
        sizes: rows of every rank.
        group: whose ranks they are.
    """
    sent = _bytes(tensor)
    padded = sent.new_zeros(max(sizes), sent.shape[1])
    padded[: len(sent)] = sent
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded, group=group)
    rows = torch.cat([one[:count] for one, count in zip(received, sizes, strict=True)])
    return _values(rows, tensor)


def scatter_sums(tensor: Tensor, sizes: list[int], rank: int, group: Any) -> Tensor:
    """This rank's rows of the sum of all ranks' tensors.

    Args:
        tensor: of all ranks' rows.
        sizes: rows of every rank.
        rank: this one's number in the group.
        group: whose ranks they are.
    """
    sent = _bytes(tensor)
    own = sizes[rank]
    received = sent.new_empty(len(sizes) * own, sent.shape[1])
    dist.all_to_all_single(received, sent, [own] * len(sizes), sizes, group=group)
    parts: Tensor = _values(received, tensor).unflatten(0, (len(sizes), own))
    return parts.float().sum(dim=0).to(tensor.dtype)


def _bytes(tensor: Tensor) -> Tensor:
    rows = tensor.contiguous().view(len(tensor), -1)
    return rows.view(torch.uint8)


def _values(rows: Tensor, like: Tensor) -> Tensor:
    return rows.view(like.dtype).view(len(rows), *like.shape[1:])

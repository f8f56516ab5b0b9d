"""Expert parallelism: a process has some of a layer's experts, whole, and runs its part of every token's selection.

Selection is made from all of a token's experts, the same in every process, so budgets mean what they always mean; then
each process drops the pairs whose expert is another's, and vLLM adds up the outputs. Knows nothing of vLLM's classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..elastic.executors import AUTO, EXECUTORS, choose_executor
from ..elastic.executors.base import Executor
from ..elastic.selection import Selection
from .stacked import StackedExperts

NAME = "vllm-local"


class AllExperts(StackedExperts):
    """A layer's experts, of which some are here: what gates and selection look at, for gates that read no weights.

    Args:
        local: those that are here.
        expert_map: int ``[E]``, the number in ``local`` of every expert; -1 where it is in another process.
        inner: name of the executor of ``local``.
    """

    def __init__(self, local: StackedExperts, expert_map: Tensor, inner: str = AUTO) -> None:
        sizes = local.gate_up_proj.shape[1:], local.down_proj.shape[1:]
        super().__init__(*(torch.empty(len(expert_map), *size, device="meta") for size in sizes))
        self.local = local
        self.expert_map = expert_map.long()
        self.inner = inner


def local_pairs(selection: Selection, expert_map: Tensor, n: int) -> Selection:
    """What runs here, with sub-experts numbered as they are here.

    Args:
        selection: sorted by sub-expert.
        expert_map: int64 ``[E]``, rising where it is not -1, so that the order is kept.
        n: sub-experts of one expert in the selection.
    """
    here = expert_map.to(selection.sub_expert.device)[selection.sub_expert // n]
    mine = here >= 0
    token, slot, sub_expert, weight = (each[mine] for each in selection)
    return Selection(token, slot, here[mine] * n + sub_expert % n, weight)


@EXECUTORS.register(NAME)
@dataclass(frozen=True)
class LocalExecutor(Executor):
    """For ``AllExperts``: another executor, over the experts that are here."""

    runs_full: ClassVar[bool] = True

    def refusal(self, module: nn.Module, x: Tensor) -> str | None:
        """Needs to know which experts are here."""
        return None if isinstance(module, AllExperts) else "all of its experts are here"

    def run(self, module: nn.Module, x: Tensor, selection: Selection, n: int, computed: Tensor | None = None) -> Tensor:
        """See ``Executor.run``; the sum over what is here."""
        experts: Any = module
        mine = local_pairs(selection, experts.expert_map, n)
        if not len(mine.token):
            return torch.zeros_like(x)
        executor = choose_executor(experts.inner, experts.local, x, len(mine.token) / n, "parts", n)
        return executor.run(experts.local, x, mine, n)

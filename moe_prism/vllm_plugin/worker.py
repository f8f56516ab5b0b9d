"""vLLM's worker, which hands every step's budgets to the model before its forward pass.

Knows nothing of how budgets were decided or of what they do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.platforms import current_platform

from ..errors import PrismError
from . import symbols
from .experts import dial_of_model, exchange_of_model
from .runners import watch
from .setup import BUDGETS, SCHEDULER

symbols.require()

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Base
else:
    from vllm.v1.worker.gpu_worker import Worker as Base


class ElasticWorker(Base):
    """The platform's worker, CPU or GPU."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load, then stand before the runner's steps and forward passes."""
        super().load_model(*args, **kwargs)
        model = self.model_runner.get_model()
        self._step: Any = None
        self._full = dial_of_model(model).full_budget
        self._exchange = exchange_of_model(model)
        self._budgets: Any = self._exchange or dial_of_model(model)
        watch(self.model_runner, self.use_v2_model_runner, self._begin, self._fill)

    def _begin(self, scheduler_output: Any) -> None:
        """Remember whose step this is; dummy steps are nobody's."""
        self._step = scheduler_output
        if scheduler_output is None:
            self._budgets.fill(None)

    def _fill(self, order: Sequence[str], tokens: int) -> None:
        if self._step is None:
            return
        budgets = getattr(self._step, BUDGETS, None)
        if budgets is None:
            raise PrismError(f"the step has no budgets; start with --scheduler-cls {SCHEDULER}")
        if self._exchange is None and all(budgets[id] == self._full for id in order):
            self._budgets.fill(None)
            return
        counts = torch.tensor([self._step.num_scheduled_tokens[id] for id in order])
        each = torch.tensor([budgets[id] for id in order]).repeat_interleave(counts)
        self._budgets.fill(torch.nn.functional.pad(each, (0, tokens - len(each)), value=1))

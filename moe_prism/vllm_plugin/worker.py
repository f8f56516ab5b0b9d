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
from .experts import dial_of_model
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
        """Load, then stand before the runner's forward passes."""
        super().load_model(*args, **kwargs)
        self._step: Any = None
        self._dial = dial_of_model(self.model_runner.get_model())
        watch(self.model_runner, self.use_v2_model_runner, self._fill)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Remember whose step this is; dummy runs have none."""
        self._step = scheduler_output
        try:
            return super().execute_model(scheduler_output)
        finally:
            self._step = None
            self._dial.fill(None)

    def _fill(self, order: Sequence[str], tokens: int) -> None:
        if self._step is None:
            return
        budgets = getattr(self._step, BUDGETS, None)
        if budgets is None:
            raise PrismError(f"the step has no budgets; start with --scheduler-cls {SCHEDULER}")
        full = self._dial.full_budget
        if all(budgets[id] == full for id in order):
            self._dial.fill(None)
            return
        counts = torch.tensor([self._step.num_scheduled_tokens[id] for id in order])
        each = torch.tensor([budgets[id] for id in order]).repeat_interleave(counts)
        self._dial.fill(torch.nn.functional.pad(each, (0, tokens - len(each)), value=1))

"""vLLM's worker, which hands every step's budgets to the model before its forward pass.

Knows nothing of how budgets were decided or of what they do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.platforms import current_platform

from ..elastic.dial import Dial
from ..errors import PrismError
from . import symbols
from .experts import dial_of_model
from .setup import SCHEDULER

symbols.require()

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Base
else:
    from vllm.v1.worker.gpu_worker import Worker as Base

BUDGETS = "moe_prism_budgets"


class ElasticWorker(Base):
    """The platform's worker, CPU or GPU."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load, then stand before the runner's forward pass."""
        super().load_model(*args, **kwargs)
        if self.use_v2_model_runner:
            raise PrismError("the plugin runs with vLLM's first model runner; set VLLM_USE_V2_MODEL_RUNNER=0")
        self._step: Any = None
        runner = self.model_runner
        dial = dial_of_model(runner.get_model())
        runner._model_forward = self._with_budgets(dial, runner._model_forward)

    def execute_model(self, scheduler_output: Any) -> Any:
        """Remember whose step this is."""
        self._step = scheduler_output
        try:
            return super().execute_model(scheduler_output)
        finally:
            self._step = None

    def _with_budgets(self, dial: Dial, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self._step is None:  # a dummy run
                return forward(*args, **kwargs)
            tokens = next(v for v in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if v is not None)
            dial.fill(self._budgets(dial.full_budget, len(tokens)))
            try:
                return forward(*args, **kwargs)
            finally:
                dial.fill(None)

        return run

    def _budgets(self, full: int, tokens: int) -> torch.Tensor | None:
        """Of every token of the step, padding at the end included; None where all are at full budget."""
        budgets = getattr(self._step, BUDGETS, None)
        if budgets is None:
            raise PrismError(f"the step has no budgets; start with --scheduler-cls {SCHEDULER}")
        if min(budgets.values()) == full:
            return None
        order = self.model_runner.input_batch.req_ids
        counts = torch.tensor([self._step.num_scheduled_tokens[id] for id in order])
        each = torch.tensor([budgets[id] for id in order]).repeat_interleave(counts)
        return torch.nn.functional.pad(each, (0, tokens - len(each)), value=1)

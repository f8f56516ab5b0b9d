"""Budgets, floors and degradations on vLLM's ``/metrics``, through its hook for statistics.

vLLM finds the class through the entry point ``vllm.stat_logger_plugins``. Knows nothing of how budgets come about.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY, Counter, Histogram
from vllm.v1.metrics.loggers import StatLoggerBase

from ..scheduling.quality import budget_buckets
from . import symbols
from .counts import PREFIX, found
from .setup import setup_of

_NAME = "moe_prism:"


class BudgetMetrics(StatLoggerBase):
    """Adds nothing where the server has no budgets."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._model: str = str(vllm_config.model_config.served_model_name or vllm_config.model_config.model)
        self._engine = str(engine_index)
        self._made: dict[str, Any] = {}
        setup = None if symbols.trouble() else setup_of(vllm_config)
        if setup is None:
            return
        full = setup.elastic.full_budget
        buckets = budget_buckets(full)
        self._make(Histogram, "token_k_active", "Budgets of generated tokens, in sub-experts.", buckets=buckets)
        self._make(Histogram, "token_k_min", "Quality floors of generated tokens.", buckets=buckets)
        self._make(Counter, "degraded_tokens", "Tokens generated below the budget that their request wants.")
        self._make(Counter, "floor_violations", "Tokens generated below their request's floor; stays 0.")

    def _make(self, kind: Any, name: str, text: str, **options: Any) -> None:
        labels = ("model_name", "engine")
        known: Any = REGISTRY._names_to_collectors.get(_NAME + name)  # another engine of this process made it
        made: Any = kind(_NAME + name, text, labels, **options) if known is None else known
        self._made[name] = made.labels(self._model, self._engine)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Add what a step's statistics carry."""
        if scheduler_stats is None or not self._made:
            return
        counts = scheduler_stats.running_lora_adapters
        for kind, name in (("budget", "token_k_active"), ("floor", "token_k_min")):
            for value, tokens in found(counts, kind):
                for _ in range(tokens):
                    self._made[name].observe(value)
        self._made["degraded_tokens"].inc(counts.get(f"{PREFIX}degraded", 0))
        self._made["floor_violations"].inc(counts.get(f"{PREFIX}violations", 0))

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

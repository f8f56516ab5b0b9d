"""From a checkpoint's directory to a model that can be served and the engine that runs it.

Knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..checkpoint.read import ElasticCheckpoint, open_checkpoint
from ..elastic import dial_of, load_elastic
from ..engine import Engine, Generation
from ..engine.identity import ENGINE, machine_of
from ..errors import PrismError
from ..scheduling import POLICIES, CostModel, Limits, Request
from ..scheduling.cost_file import load_cost_model
from .admission import ServedModel

logger = logging.getLogger("moe_prism.serving")


@dataclass(frozen=True)
class EngineOptions:
    """How a checkpoint is run.

    Attributes:
        policy: registered name.
        max_running: requests that run at once.
        memory_tokens: tokens of prompts and outputs that are kept at once.
        max_prefill: prompt tokens of one step.
        k_min: floor of requests that name none; None: full budget.
        hopeless: what becomes of requests whose objectives no budget can meet: "serve" at the floor, or "refuse".
        memory: bytes of the whole process, for a packed checkpoint; None: the model is in memory.
    """

    policy: str = "continuous"
    max_running: int = 64
    memory_tokens: int = 16384
    max_prefill: int = 256
    k_min: int | None = None
    hopeless: Literal["serve", "refuse"] = "serve"
    memory: int | None = None

    def limits(self, full_budget: int) -> Limits:
        """Checked against the checkpoint; raises PrismError for impossible values."""
        POLICIES.get(self.policy)
        if self.k_min is not None and not 1 <= self.k_min <= full_budget:
            raise PrismError(f"k_min must be from 1 to {full_budget} (full budget), got {self.k_min}")
        return Limits(full_budget, self.max_running, self.memory_tokens, self.max_prefill)


def check(path: Path, options: EngineOptions) -> None:
    """Raise PrismError for a checkpoint or an option that cannot be served, before anything heavy is loaded."""
    options.limits(open_checkpoint(path, verify=False).elastic.full_budget)


def load(
    path: Path, tokenizer: Any, name: str, options: EngineOptions, *, dtype: str | torch.dtype, verify: bool
) -> tuple[ServedModel, Engine]:
    """Load weights and build the engine, warmed up.

    Args:
        path: an elastic checkpoint, or with ``memory`` a packed one.
        tokenizer: of transformers.
        name: what clients call the model.
        options: see ``EngineOptions``.
        dtype: of the weights in memory.
        verify: compare all files with their checksums first.

    Raises:
        PrismError: not an elastic checkpoint, or an option that does not fit it.
    """
    checkpoint = open_checkpoint(path, verify=False)
    limits = options.limits(checkpoint.elastic.full_budget)
    blocks = None
    if options.memory is None:
        model = load_elastic(path, dtype=dtype, verify=verify)
        cost = cost_model(checkpoint, machine_of(model))
    else:
        from ..offload import load_offloaded  # a server in memory starts without it
        from ..offload.load import manager_of

        model = load_offloaded(path, options.memory, dtype=dtype, context=options.memory_tokens, verify=verify)
        blocks = manager_of(model).statistics
        # A step's time depends on what was cached: no sum of its tokens' terms tells it.
        logger.warning("%s is offloaded: load and objectives will not move budgets", path)
        cost = _free(checkpoint)
    policy = POLICIES.get(options.policy)(cost)
    engine = Engine(model, policy, limits, hopeless=options.hopeless)
    config: Any = model.config.get_text_config()
    served = ServedModel(
        name=name,
        tokenizer=tokenizer,
        full_budget=limits.full_budget,
        context=min(config.max_position_embeddings, options.memory_tokens),
        vocabulary=config.vocab_size,
        end_tokens=_end_tokens(model, tokenizer),
        k_min=options.k_min or limits.full_budget,
        created=int(time.time()),
        points=checkpoint.operating_points(),
        named=dict(dial_of(model).points),
        blocks=blocks,
    )
    warm_up(engine)
    return served, engine


def cost_model(checkpoint: ElasticCheckpoint, machine: str) -> CostModel:
    """The checkpoint's; where there is none, one to which every step is free, so that nobody gets less than he wants.

    Raises:
        PrismError: it was measured on another machine or engine.
    """
    if checkpoint.cost_model() is not None:
        return load_cost_model(checkpoint, engine=ENGINE, machine=machine)
    logger.warning(
        "%s has no cost model: load and objectives will not move budgets. Measure one with `moe-prism profile-cost`",
        checkpoint.path,
    )
    return _free(checkpoint)


def _free(checkpoint: ElasticCheckpoint) -> CostModel:
    elastic = checkpoint.elastic
    return CostModel.free(elastic.full_budget, elastic.num_experts * elastic.num_sub_experts)


def warm_up(engine: Engine) -> None:
    """One short request at half budget, so that kernels are compiled or loaded before the first client waits."""
    k = max(1, engine.limits.full_budget // 2)
    engine.submit(Generation(Request("warm-up", engine.clock(), 4, 3, k, k), [0, 1, 2, 3]))
    for _ in range(100):  # plans may take a step to admit
        if any(event.finished for event in engine.step() if not hasattr(event, "error")):
            return


def _end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    found = getattr(model.generation_config, "eos_token_id", None)
    ids = found if isinstance(found, list) else [found]
    return tuple(sorted({int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None}))

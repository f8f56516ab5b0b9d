"""The cost model of this engine: read for its policy, or the steps that one is fitted to.

Step times of vLLM are not those of the embedded engine, so a checkpoint's own cost model does not serve here.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vllm

from ..evaluation.environment import cpu_name, usable_cores
from ..scheduling import CostModel, StepLoad
from ..scheduling.cost_file import read_cost_model
from .planner import Part, Track
from .setup import Setup

logger = logging.getLogger("moe_prism.vllm_plugin")


def engine_name() -> str:
    """What a cost model of this engine is marked with."""
    return f"vllm {vllm.__version__}"


def machine_name(vllm_config: Any) -> str:
    """The same for the machine, e.g. "AMD EPYC 7R13 Processor, 2 cores, cpu, bfloat16"."""
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    return f"{cpu_name()}, {usable_cores()} cores, {vllm_config.device_config.device_type}, {dtype}"


def cost_model_of(setup: Setup, vllm_config: Any) -> CostModel:
    """The one that the options name; without one, every step is free, so nobody gets less than he wants.

    Raises:
        PrismError: it was measured on another engine, machine or checkpoint.
    """
    checkpoint = setup.checkpoint()
    if setup.options.cost_model is not None:
        model = read_cost_model(Path(setup.options.cost_model))
        model.require(engine=engine_name(), machine=machine_name(vllm_config), checkpoint=checkpoint.fingerprint())
        return model
    logger.warning(
        "no cost model is named: load and objectives will not move budgets; docs/vllm.md says how to fit one"
    )
    elastic = setup.elastic
    return CostModel.free(elastic.full_budget, elastic.num_experts * elastic.num_sub_experts)


class Recorder:
    """Appends the load and the seconds of every step to a file of JSON lines.

    vLLM may plan a step while the one before runs, so a step lasts from its beginning, or from the end of the one
    before where that is later, to its own end.
    """

    def __init__(self, path: Path, cost: CostModel) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._cost = cost
        self._begun: dict[int, tuple[float, StepLoad]] = {}
        self._ended = 0.0

    def begin(self, step: object, tracks: Sequence[Track], parts: Sequence[Part], budgets: Mapping[str, int]) -> None:
        """A step is handed over."""
        if not parts:
            return
        decoding = [(p, t) for p, t in zip(parts, tracks, strict=True) if p.before >= t.request.prompt_tokens]
        prompts = [(p, t) for p, t in zip(parts, tracks, strict=True) if p.before < t.request.prompt_tokens]
        load = self._cost.load(
            [budgets[p.id] for p, _ in decoding],
            float(sum(p.before for p, _ in decoding)),
            [p.count for p, _ in prompts],
            [budgets[p.id] for p, _ in prompts],
            [p.before for p, _ in prompts],
        )
        self._begun[id(step)] = time.perf_counter(), load

    def end(self, step: object) -> None:
        """Its tokens are there."""
        now = time.perf_counter()
        found = self._begun.pop(id(step), None)
        if found is not None:
            seconds = now - max(found[0], self._ended)
            self._file.write(json.dumps([*found[1], seconds]) + "\n")
            self._file.flush()
        self._ended = now

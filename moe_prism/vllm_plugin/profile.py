"""Measure how long vLLM's steps take on this machine, and fit the cost model that its policy needs.

Steps are those of the plugin's own scheduler, which writes down what each computes and how long it takes. Knows nothing
of policies.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import PrismError
from ..scheduling import CostModel, StepLoad
from ..scheduling.cost_fit import fit_held_out
from .setup import SCHEDULER, WORKER


class Scene(NamedTuple):
    """Requests that are sent together.

    Attributes:
        prompts: tokens of each prompt.
        budgets: of each request.
        late: prompt tokens of one more, which comes while they decode; 0: none.
    """

    prompts: tuple[int, ...]
    budgets: tuple[int, ...]
    late: int


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Attributes:
        batches: requests of a scene.
        contexts: tokens of each prompt; all prompts of a scene hold no more than ``held``.
        held: tokens.
        shares: budgets, as shares of full budget; and one mix of them.
        steps: decode steps of a scene.
        seed: of prompts, mixes, the order of scenes and the steps held out of the fit.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    contexts: tuple[int, ...] = (16, 128)
    held: int = 1024
    shares: tuple[float, ...] = (1 / 8, 1 / 4, 1 / 2, 1.0)
    steps: int = 6
    seed: int = 0

    def scenes(self, full_budget: int) -> list[Scene]:
        """In a random order, so that a machine that slows down does not look like a trend."""
        rng = np.random.default_rng(self.seed)
        budgets = [max(1, round(share * full_budget)) for share in self.shares]
        found = []
        for batch in self.batches:
            for context in self.contexts:
                prompts = (max(1, min(context, self.held // batch)),) * batch
                late = int(rng.choice(self.contexts))
                found += [Scene(prompts, (k,) * batch, late * (i % 2)) for i, k in enumerate(budgets)]
                found.append(Scene(prompts, tuple(rng.choice(budgets, batch).tolist()), late))
        rng.shuffle(found)
        return found


def profile(
    path: Path,
    grid: Grid,
    engine_options: dict[str, Any],
    progress: Callable[[str, int, int], None] | None = None,
) -> CostModel:
    """Run every scene, after one to warm up, and fit.

    The engine has a process of its own, as when it serves: there vLLM chooses libraries and threads that this process
    cannot change any more.

    Args:
        path: an elastic checkpoint.
        grid: what to measure.
        engine_options: arguments of ``vllm.LLM`` as they will be used to serve.
        progress: called with ("measuring steps", scenes done, scenes in all).

    Raises:
        PrismError: vLLM is not installed, or the checkpoint cannot be served by it.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # of that process
    try:
        from vllm import LLM
    except ImportError as error:
        raise PrismError(f"vLLM cannot be imported ({error}); run this in the environment that serves") from error
    from .costs import engine_name, machine_name
    from .setup import setup_of

    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "steps.jsonl"
        llm = LLM(
            str(path),
            worker_cls=WORKER,
            scheduler_cls=SCHEDULER,
            enable_prefix_caching=False,
            additional_config={"moe_prism": {"record": str(record)}},
            **engine_options,
        )
        config = llm.llm_engine.vllm_config
        setup = setup_of(config)
        assert setup is not None  # both halves were named
        elastic = setup.elastic
        vocabulary = config.model_config.get_vocab_size()
        scenes = grid.scenes(elastic.full_budget)
        _drive(llm, scenes[0], grid, vocabulary)
        record.write_text("")
        for number, scene in enumerate(scenes):
            if progress is not None:
                progress("measuring steps", number, len(scenes))
            _drive(llm, scene, grid, vocabulary)
        if progress is not None:
            progress("measuring steps", len(scenes), len(scenes))
        llm.llm_engine.engine_core.shutdown()
        rows = [json.loads(line) for line in record.read_text().splitlines()]
    return fit_held_out(
        [StepLoad(*row[:-1]) for row in rows],
        [row[-1] for row in rows],
        seed=grid.seed,
        full_budget=elastic.full_budget,
        sub_experts=elastic.num_experts * elastic.num_sub_experts,
        engine=engine_name(),
        machine=machine_name(config),
        checkpoint=setup.checkpoint().fingerprint(),
    )


_NAMES = (f"profile-{number}" for number in count())


def _drive(llm: Any, scene: Scene, grid: Grid, vocabulary: int) -> None:
    """Send a scene's requests and see them through; the late one comes after three steps."""
    rng = np.random.default_rng((grid.seed, len(scene.prompts), scene.prompts[0], sum(scene.budgets)))
    engine = llm.llm_engine
    for prompt, budget in zip(scene.prompts, scene.budgets, strict=True):
        engine.add_request(*_request(rng, prompt, budget, grid.steps, vocabulary))
    steps = 0
    while engine.has_unfinished_requests():
        engine.step()
        steps += 1
        if steps == 3 and scene.late:
            engine.add_request(*_request(rng, scene.late, scene.budgets[0], 2, vocabulary))


def _request(rng: Any, prompt: int, budget: int, tokens: int, vocabulary: int) -> tuple[str, Any, Any]:
    from vllm import SamplingParams

    ids = rng.integers(0, vocabulary, prompt).tolist()
    asked = SamplingParams(max_tokens=tokens + 1, temperature=0, ignore_eos=True, extra_args={"k_active": int(budget)})
    return next(_NAMES), {"prompt_token_ids": ids}, asked

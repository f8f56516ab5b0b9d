"""The one-time benchmark of an engine: times of steps of many kinds, from which the cost model is fitted.

Steps are run by the engine that will serve, plan by plan. A *scene* is a batch of decoding requests of one context; in
it steps of all budgets are measured, with and without pieces of prompts. All scenes are gone through several times, in
another order each time, and the median of a step's times counts: a machine that is slow for a while spoils one time of
every step, not all times of one. After every scene what was measured is kept, so that an interrupted benchmark goes on
where it was. Knows no policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ..elastic import full_budget
from ..engine import Engine, FailedEvent, Generation, Sampling
from ..engine.identity import ENGINE, machine_of
from ..errors import PrismError
from ..experts import find_expert_layers
from ..scheduling import CostModel, Limits, Policy, Request, State, StepLoad, StepPlan
from ..scheduling.cost_fit import fit_held_out
from ..scheduling.step_load import TERMS
from .partial import Partial

Draws = np.random.Generator


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Attributes:
        batches: decoding requests of a scene; one without any is added.
        contexts: tokens of each before the scene begins, as far as all of them hold no more than ``held``.
        held: tokens; computing them takes most of the benchmark's time.
        pieces: prompt tokens of a step.
        long_pieces: the same, measured without decoding requests only, as far as the model's context allows.
        shares: budgets, as shares of full budget; and two steps of budgets drawn at random, from these and from all.
        repeats: times that all scenes are gone through.
        seed: of prompts, random budgets, the order of scenes and the steps held out of the fit.
    """

    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    contexts: tuple[int, ...] = (32, 384)
    held: int = 4096
    pieces: tuple[int, ...] = (8, 32, 128, 256)
    long_pieces: tuple[int, ...] = (1024,)
    shares: tuple[float, ...] = (1 / 16, 1 / 4, 1 / 2, 3 / 4, 1.0)
    repeats: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = (*self.batches, *self.contexts, *self.pieces, *self.long_pieces, self.held, self.repeats)
        if min(numbers) < 1 or not all(0 < share <= 1 for share in self.shares) or not self.batches:
            raise PrismError(
                "batches, contexts, pieces, held and repeats must be 1 or more and shares in (0, 1], got "
                f"{self.batches}, {self.contexts}, {self.pieces}, {self.long_pieces}, {self.held}, {self.repeats}, "
                f"{self.shares}"
            )

    def scenes(self) -> list[tuple[int, int, int]]:
        """(turn, batch, context), all of one turn after the other, in a random order inside a turn."""
        found = [
            (batch, min(context, max(1, self.held // max(1, batch))))
            for batch in (0, *self.batches)
            for context in self.contexts
        ]
        rng = np.random.default_rng(self.seed)
        return [(turn, *found[i]) for turn in range(self.repeats) for i in rng.permutation(len(found)).tolist()]

    @property
    def memory_tokens(self) -> int:
        """What the largest scene holds."""
        steps = len(self.shares) + 2 + len(self.pieces)
        room = (max(self.batches) + 1) * (max(self.contexts) + steps + max(self.pieces) + 2)
        return max(room, max(self.long_pieces, default=0) + 1)


class Step(NamedTuple):
    """One kind of step in a scene: a budget for each decoding request, and a piece of a prompt or none.

    Attributes:
        budgets: of the decoding requests.
        piece: prompt tokens.
        start: prompt tokens computed before.
        k_active: of the piece.
    """

    budgets: tuple[int, ...]
    piece: int = 0
    start: int = 0
    k_active: int = 0


@dataclass(frozen=True)
class _Script(Policy):
    """Says what it is told."""

    plans: list[StepPlan] = field(default_factory=list)

    def plan(self, state: State, now: float) -> StepPlan:
        return self.plans.pop(0)


class Profiler:
    """Runs scenes on an engine of its own."""

    def __init__(self, model: PreTrainedModel, grid: Grid) -> None:
        layers = find_expert_layers(model)
        full = full_budget(model)
        self.sub_experts = layers[0].num_experts * full // layers[0].top_k
        self.grid, self.full = grid, full
        # only its load() is used
        self.cost = CostModel((1.0,) * len(TERMS), full, self.sub_experts)
        self.script = _Script(self.cost)
        limits = Limits(full, max(grid.batches) + 1, grid.memory_tokens)
        self.engine = Engine(model, self.script, limits)
        self._vocabulary = int(model.config.get_text_config().vocab_size)
        self._longest = int(model.config.get_text_config().max_position_embeddings) - 1
        self._names = (f"p{i}" for i in count())

    def scene(self, batch: int, context: int) -> Iterator[tuple[StepLoad, float]]:
        """Loads and seconds of all steps of a scene, each measured once; the loads are the same every time."""
        rng = np.random.default_rng((self.grid.seed, batch, context))
        steps = self._steps(batch, context, rng)
        running = [self._submit(rng, context, len(steps) + 2) for _ in range(batch)]
        for name in running:
            self._run(StepPlan((name,), {name: self.full}, {name: context}))
        self._measure(running, steps[0], rng)  # only warms up
        for so_far, step in enumerate(steps, start=context + 2):
            pieces = ([step.piece], [step.k_active], [step.start]) if step.piece else ([], [], [])
            load = self.cost.load(step.budgets, float(batch * so_far), *pieces)
            yield load, self._measure(running, step, rng)
        for name in running:
            self.engine.cancel(name)
        self.engine.step()

    def _steps(self, batch: int, context: int, rng: Draws) -> list[Step]:
        budgets = [max(1, round(share * self.full)) for share in self.grid.shares]
        equal = [(k,) * batch for k in budgets]
        # what a server's batch looks like: floors of a few kinds, and anything between
        mixed = [tuple(rng.choice(budgets, batch).tolist()), tuple(rng.integers(1, self.full + 1, batch).tolist())]
        steps = [Step(each) for each in [*equal, *mixed] if batch]
        for piece in self.grid.pieces:
            if batch:
                steps.append(Step(equal[int(rng.integers(len(equal)))], piece, 0, int(rng.choice(budgets))))
            else:
                steps += [Step((), piece, 0, k) for k in budgets]
                steps += [Step((), piece, context, int(k)) for k in rng.choice(budgets, 2, replace=False)]
        if not batch and context == min(self.grid.contexts):
            long = [piece for piece in self.grid.long_pieces if piece <= self._longest]
            steps += [Step((), piece, 0, k) for piece in long for k in budgets]
        return steps

    def _measure(self, running: list[str], step: Step, rng: Draws) -> float:
        budgets = dict(zip(running, step.budgets, strict=True))
        if not step.piece:
            return self._run(StepPlan((), budgets, {}))
        name = self._submit(rng, step.start + step.piece, 1)
        if step.start:
            self._run(StepPlan((name,), {name: step.k_active}, {name: step.start}))
        admit = () if step.start else (name,)
        return self._run(StepPlan(admit, {**budgets, name: step.k_active}, {name: step.piece}))

    def _submit(self, rng: Draws, prompt: int, tokens: int) -> str:
        name = next(self._names)
        ids: NDArray[np.int64] = rng.integers(0, self._vocabulary, prompt)
        request = Request(name, self.engine.clock(), prompt, tokens, 1, self.full)
        self.engine.submit(Generation(request, ids.tolist(), Sampling()))
        return name

    def _run(self, plan: StepPlan) -> float:
        self.script.plans.append(plan)
        began = time.perf_counter()
        events = self.engine.step()
        seconds = time.perf_counter() - began
        for event in events:
            if isinstance(event, FailedEvent):
                raise RuntimeError(f"a step of the benchmark failed: {event.error}")
        return seconds


def profile_cost(
    model: PreTrainedModel,
    checkpoint: str,
    grid: Grid,
    partial: Path,
    progress: Callable[[str, int, int], None] | None = None,
) -> CostModel:
    """Measure steps and fit the cost model.

    Args:
        model: elastic, as it will serve.
        checkpoint: fingerprint of its weights.
        grid: what to measure.
        partial: file of what was measured so far; another one's (grid, machine, checkpoint) is overwritten.
        progress: called with ("measuring steps", scenes done, scenes in all).

    Raises:
        PrismError: the grid does not fit the model's context.
    """
    identity = {"engine": ENGINE, "machine": machine_of(model), "checkpoint": checkpoint}
    done = Partial(partial, {"grid": asdict(grid), **identity})
    profiler = Profiler(model, grid)
    scenes = grid.scenes()
    for number, (turn, batch, context) in enumerate(scenes):
        if progress is not None:
            progress("measuring steps", number, len(scenes))
        if f"{turn},{batch},{context}" not in done:
            found = [[*load, seconds] for load, seconds in profiler.scene(batch, context)]
            done[f"{turn},{batch},{context}"] = found
    if progress is not None:
        progress("measuring steps", len(scenes), len(scenes))
    loads: list[StepLoad] = []
    seconds: list[float] = []
    for _, batch, context in scenes[: len(scenes) // grid.repeats]:
        turns = np.array([done[f"{turn},{batch},{context}"] for turn in range(grid.repeats)])
        loads += [StepLoad(*row) for row in turns[0, :, :-1].tolist()]
        seconds += np.median(turns[:, :, -1], axis=0).tolist()
    held = profiler.engine.key_value_bytes
    model_of_cost = fit_held_out(
        loads,
        seconds,
        seed=grid.seed,
        full_budget=profiler.full,
        sub_experts=profiler.sub_experts,
        token_bytes=held // grid.memory_tokens,
        fixed_bytes=sum(p.nbytes for p in (*model.parameters(), *model.buffers())),
        **identity,
    )
    done.finish()
    return model_of_cost

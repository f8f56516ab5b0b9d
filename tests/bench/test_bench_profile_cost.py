"""The one-time benchmark measures what it says, goes on after an interruption, and its record names the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from making import elastic_model
from transformers import PreTrainedModel

from moe_prism.bench.profile_cost import Grid, Profiler, profile_cost
from moe_prism.engine.identity import ENGINE, machine_of
from moe_prism.errors import PrismError

GRID = Grid(batches=(1, 2), contexts=(4, 9), pieces=(2, 5), shares=(0.25, 1.0), repeats=2, seed=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return elastic_model("olmoe", tmp_path_factory.mktemp("model"))


def test_loads_are_those_of_the_steps(model: PreTrainedModel) -> None:
    profiler = Profiler(model, GRID)
    steps = list(profiler.scene(2, 9))
    assert all(seconds > 0 for _, seconds in steps)
    loads = [load for load, _ in steps]
    assert [load.decode for load in loads] == [2] * len(loads)
    assert [load.prefill_tokens for load in loads] == [0, 0, 0, 0, 2, 5]
    assert [load.decode_work for load in loads][:2] == [0.5, 2.0]
    # contexts grow by a token in every step; one only warms up
    assert [load.context for load in loads] == [2 * (9 + 2 + i) for i in range(6)]
    assert loads == [load for load, _ in profiler.scene(2, 9)]  # in every turn
    assert profiler.engine.stats.running == profiler.engine.stats.waiting == 0
    prompts = [load for load, _ in profiler.scene(0, 9)]
    assert {load.decode for load in prompts} == {0}
    assert {load.prefill_context for load in prompts} == {1 + 2, 15, 10 + 11, 10 + 11 + 12 + 13 + 14}


def test_it_goes_on_where_it_was_interrupted(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[int]] = []
    scene = Profiler.scene
    monkeypatch.setattr(Profiler, "scene", lambda self, *which: ran.append(list(which)) or scene(self, *which))
    partial = tmp_path / "partial.json"

    def stop(_stage: str, done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile_cost(model, "abc", GRID, partial, stop)
    assert len(ran) == 2
    told: list[tuple[int, int]] = []
    found = profile_cost(model, "abc", GRID, partial, lambda _, done, total: told.append((done, total)))
    assert ran == [scene for _, *scene in GRID.scenes()]  # none twice
    assert told[-1] == (12, 12)
    assert not partial.exists()
    assert found.token_bytes == 2 * 2 * 32 * 4  # layers, keys and values, hidden size, fp32
    assert found.fixed_bytes == sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    assert (found.full_budget, found.sub_experts) == (16, 32)
    assert found.median_error is not None
    found.require(engine=ENGINE, machine=machine_of(model), checkpoint="abc")
    with pytest.raises(PrismError, match="profile-cost"):
        found.require(engine=ENGINE, machine="another", checkpoint="abc")


def test_long_prompts_are_measured_alone_and_as_far_as_the_context_goes(model: PreTrainedModel) -> None:
    profiler = Profiler(model, replace(GRID, long_pieces=(20, 127, 128)))  # the model's context is 128
    assert [load.prefill_tokens for load, _ in profiler.scene(0, 4)][-4:] == [20, 20, 127, 127]
    for batch, context in ((0, 9), (1, 4)):
        assert max(load.prefill_tokens for load, _ in profiler.scene(batch, context)) == 5


def test_bad_grids_are_refused() -> None:
    with pytest.raises(PrismError, match="must be 1 or more"):
        Grid(batches=(0, 1))
    with pytest.raises(PrismError, match="shares"):
        Grid(shares=(0.5, 1.5))

from __future__ import annotations

import pytest
import torch
from making import logits
from packing import packed
from tiny import tokens

from moe_prism import load_elastic
from moe_prism.elastic import budget, full_budget
from moe_prism.errors import CheckpointError, PrismError
from moe_prism.offload import load_offloaded
from moe_prism.offload.block_file import BlockFile
from moe_prism.offload.deadline import set_deadline
from moe_prism.offload.guessing import Guessing
from moe_prism.offload.load import attach_blocks, load_resident, manager_of


@pytest.fixture(autouse=True)
def always_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models this small hardly wait, so that nothing would be read ahead."""
    monkeypatch.setattr(Guessing, "worth", True)


FAMILIES = ("olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe")


@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_equals_the_model_in_memory_at_every_budget(family: str, tmp_path) -> None:
    made = packed(family, tmp_path)
    original = load_elastic(made.elastic, executor="reference", fast_linear=False)
    model, _ = load_resident(made.packed, "auto")
    full = full_budget(original)
    manager = attach_blocks(model, BlockFile(made.packed / "blocks"), full + 3)
    for k_active in (1, full // 2, full - 1, full):
        with budget(original, k_active), budget(model, k_active):
            assert (logits(model) - logits(original)).abs().max() < 1e-4
    wanted = original.generate(tokens(1, 5), max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(tokens(1, 5), max_new_tokens=12, do_sample=False), wanted)
    assert manager.statistics.misses > 0
    assert manager.statistics.predicted > 0
    manager.close()


@pytest.mark.parametrize("rule", ["lru", "lfu-decay", "gate-aware", "frequent-recent"])
def test_results_do_not_depend_on_what_is_cached(rule: str, tmp_path) -> None:
    made = packed("olmoe", tmp_path)
    found = []
    for slots, readers, ahead in ((16, 1, False), (17, 3, True), (64, 2, True)):
        model, _ = load_resident(made.packed, "auto")
        manager = attach_blocks(
            model, BlockFile(made.packed / "blocks"), slots, rule=rule, readers=readers, read_ahead=ahead
        )
        with budget(model, 7):
            found += [logits(model), logits(model)]
        manager.close()
    assert all(torch.equal(other, found[0]) for other in found)


@pytest.mark.parametrize("block", [1, 2])
def test_skipped_neurons_and_compensation_are_those_of_the_model_in_memory(block: int, tmp_path) -> None:
    how = {"solver": "importance", "neurons": "gate-first", "neuron_block": block, "compensation_budgets": 2}
    made = packed("olmoe", tmp_path, **how)
    original = load_elastic(made.elastic, executor="masked", fast_linear=False)
    model, _ = load_resident(made.packed, "auto")
    manager = attach_blocks(model, BlockFile(made.packed / "blocks"), 20)
    for k_active in (2, 6, 11):
        with budget(original, k_active), budget(model, k_active):
            assert (logits(model) - logits(original)).abs().max() < 1e-4
    manager.close()


def test_a_prompt_reads_every_block_once(tmp_path) -> None:
    made = packed("olmoe", tmp_path)
    model, _ = load_resident(made.packed, "auto")
    manager = attach_blocks(model, BlockFile(made.packed / "blocks"), 16, read_ahead=False)
    read: list[int] = []
    fill = manager._fill
    manager._fill = lambda block, slot: read.append(block) or fill(block, slot)  # type: ignore[method-assign]
    logits(model, batch=4, length=64)
    assert len(read) == len(set(read))
    assert len(read) > 16  # more than fit at once
    manager.close()


def test_without_time_the_floor_runs_and_with_time_the_budget(tmp_path) -> None:
    made = packed("olmoe", tmp_path)
    original = load_elastic(made.elastic, executor="reference", fast_linear=False)
    model, _ = load_resident(made.packed, "auto")
    manager = attach_blocks(model, BlockFile(made.packed / "blocks"), 16, read_ahead=False)
    one = tokens(1, 1)
    for milliseconds, budgets in ((1e9, (12, 12)), (1e-6, (3, 12))):
        pace = set_deadline(model, milliseconds, k_min=3)
        assert pace is not None
        with budget(model, 12), budget(original, 12), torch.no_grad():
            model(one)  # of the first token nothing is known
            pace.ran = pace.places = 0
            found = model(one).logits
            if milliseconds > 1:
                assert (found - original(one).logits).abs().max() < 1e-4
        assert budgets[0] <= pace.mean_budget <= budgets[1]
    set_deadline(model, None)
    with budget(model, 5), budget(original, 5), torch.no_grad():
        assert (model(one).logits - original(one).logits).abs().max() < 1e-4
    with pytest.raises(PrismError, match="tpot_ms must be above 0"):
        set_deadline(model, 0.0)
    with pytest.raises(PrismError, match="k_active must be"):
        set_deadline(model, 10.0, k_min=99)
    manager.close()


def test_memory_that_is_too_small_names_what_would_do(tmp_path) -> None:
    made = packed("olmoe", tmp_path)
    with pytest.raises(PrismError, match=r"a memory of 0\.10 GB is too small.*it takes \d\.\d\d GB.*raise --memory"):
        load_offloaded(made.packed, 100_000_000)
    model = load_offloaded(made.packed, 8_000_000_000)
    manager = manager_of(model)
    assert manager.cache.slots == manager.layout.blocks  # never more places than blocks
    with pytest.raises(PrismError, match="the model is in memory"):
        manager_of(load_elastic(made.elastic))
    manager.close()


def test_what_is_not_a_whole_packed_checkpoint_is_refused(tmp_path) -> None:
    made = packed("olmoe", tmp_path)
    with pytest.raises(CheckpointError, match="not a packed checkpoint"):
        load_offloaded(made.elastic, 8_000_000_000)
    file = made.packed / "resident.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"resident\.safetensors is truncated"):
        load_offloaded(made.packed, 8_000_000_000)

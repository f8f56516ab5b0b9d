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
from moe_prism.offload.load import attach_blocks, load_resident, manager_of

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


@pytest.mark.parametrize("rule", ["lru", "lfu-decay", "gate-aware"])
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


def test_skipped_neurons_and_compensation_are_those_of_the_model_in_memory(tmp_path) -> None:
    made = packed("olmoe", tmp_path, solver="importance", neurons="gate-first", compensation_budgets=2)
    original = load_elastic(made.elastic, executor="masked", fast_linear=False)
    model, _ = load_resident(made.packed, "auto")
    manager = attach_blocks(model, BlockFile(made.packed / "blocks"), 20)
    for k_active in (2, 6, 11):
        with budget(original, k_active), budget(model, k_active):
            assert (logits(model) - logits(original)).abs().max() < 1e-4
    manager.close()


def test_memory_that_is_too_small_names_what_would_do(tmp_path) -> None:
    made = packed("olmoe", tmp_path)
    with pytest.raises(PrismError, match=r"a memory of 0\.10 GB is too small.*it takes \d\.\d\d GB.*raise --memory"):
        load_offloaded(made.packed, 100_000_000)
    model = load_offloaded(made.packed, 8_000_000_000)
    manager = manager_of(model)
    assert manager.cache.slots == manager.file.layout.blocks  # never more places than blocks
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

from __future__ import annotations

import threading

import pytest
import torch
from making import logits, recipe, save_stock
from tiny import tokens

import moe_prism
from moe_prism import load_elastic, make_elastic
from moe_prism.elastic import budget, full_budget
from moe_prism.errors import CheckpointError, PrismError
from moe_prism.offload import load_offloaded, pack_checkpoint
from moe_prism.offload.block_file import BlockFile
from moe_prism.offload.load import _resident, attach_blocks, manager_of

FAMILIES = ("olmoe", "mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "granitemoe")


def packed(family: str, folder, **changes):
    stock = save_stock(folder / "stock", family)
    make_elastic(str(stock), folder / "elastic", recipe(**changes))
    pack_checkpoint(folder / "elastic", folder / "packed")
    return folder / "elastic", folder / "packed"


@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_equals_the_model_in_memory_at_every_budget(family: str, tmp_path) -> None:
    elastic, folder = packed(family, tmp_path)
    original = load_elastic(elastic, executor="reference", fast_linear=False)
    model, _ = _resident(folder, "auto")
    with BlockFile(folder / "blocks") as file:
        full = full_budget(original)
        manager = attach_blocks(model, file, full + 3, read_ahead=True)
        for k_active in (1, full // 2, full - 1, full):
            with budget(original, k_active), budget(model, k_active):
                assert (logits(model) - logits(original)).abs().max() < 1e-4
        wanted = original.generate(tokens(1, 5), max_new_tokens=12, do_sample=False)
        assert torch.equal(model.generate(tokens(1, 5), max_new_tokens=12, do_sample=False), wanted)
        assert manager.statistics.misses > 0 and manager.statistics.predicted > 0
        manager.close()

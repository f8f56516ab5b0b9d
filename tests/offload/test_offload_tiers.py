from __future__ import annotations

import pytest
import torch
from fake_device import FakeDevice, device_tier
from hypothesis import given, settings
from hypothesis import strategies as st
from making import logits
from packing import block_file, content, packed

from moe_prism import load_elastic
from moe_prism.elastic import budget, full_budget
from moe_prism.errors import PrismError
from moe_prism.offload.block_file import BlockFile
from moe_prism.offload.eviction import EVICTION
from moe_prism.offload.load import attach_tier, load_resident
from moe_prism.offload.manager import Manager
from moe_prism.offload.tiers import DeviceTier


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_device_that_lags_behind_computes_with_the_blocks_it_was_given(tmp_path_factory, data) -> None:
    path = tmp_path_factory.mktemp("blocks") / "blocks"
    layout = block_file(path)
    device = FakeDevice()
    slots = data.draw(st.integers(2, 6))
    tier = device_tier(BlockFile(path), slots, device)
    seen: list[tuple[int, bytes]] = []
    with Manager(tier, EVICTION.create("frequent-recent"), 2) as manager:
        for _ in range(data.draw(st.integers(1, 10))):
            layer = data.draw(st.integers(0, 1)) * layout.per_layer
            inside = st.integers(layer, layer + layout.per_layer - 1)
            wanted = data.draw(st.lists(inside, unique=True, min_size=1, max_size=slots))
            manager.read_ahead(data.draw(st.lists(inside, max_size=4)))
            with manager.step(wanted, [1.0] * len(wanted)) as step:
                for batch in step:
                    for ready in batch:
                        rows = tier.rows()[ready.slot * tier.rows_per_slot :][: tier.rows_per_slot]
                        device.begin(
                            lambda rows=rows, b=wanted[ready.position]: seen.append((b, rows.numpy().tobytes()))
                        )
        device.finish()
    assert seen
    assert all(found == content(path, layout, block) for block, found in seen)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_model_on_a_device_tier_equals_the_one_in_memory(family: str, tmp_path) -> None:
    made = packed(family, tmp_path)
    original = load_elastic(made.elastic, executor="reference", fast_linear=False)
    model, _ = load_resident(made.packed, "auto")
    full = full_budget(original)
    manager = attach_tier(model, device_tier(BlockFile(made.packed / "blocks"), full + 3, FakeDevice(0.0)))
    for k_active in (1, full // 2, full):
        with budget(original, k_active), budget(model, k_active):
            assert (logits(model) - logits(original)).abs().max() < 1e-4
    assert manager.tier.bandwidth(2, 8) > 0
    manager.close()


def test_blocks_of_the_wrong_size_are_refused(tmp_path) -> None:
    layout = block_file(tmp_path / "blocks")
    with pytest.raises(PrismError, match=r"blocks in memory must be 16 of \d+ bytes"):
        DeviceTier(torch.zeros(3, 8, dtype=torch.uint8), layout, 2, FakeDevice())


def test_a_place_is_not_filled_before_the_device_has_passed_what_was_begun_before_there_were_places(tmp_path) -> None:
    block_file(tmp_path / "blocks")
    device, order = FakeDevice(0.02), []
    device.begin(lambda: order.append("work"))
    tier = device_tier(BlockFile(tmp_path / "blocks"), 2, device)
    tier.fill(0, 1, lambda _: order.append("filled") is None)
    assert order == ["work", "filled"]

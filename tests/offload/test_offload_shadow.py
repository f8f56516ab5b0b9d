"""Blocks at 4 bits beside the stored ones: which run as what, what comes out, what is refused."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import logits
from packing import Packed, packed
from tiny import tokens
from torch import Tensor

from moe_prism import load_elastic
from moe_prism.elastic import budget, dial_of
from moe_prism.elastic.budgets import elastic_layers
from moe_prism.elastic.executors import EXECUTORS, Executor
from moe_prism.elastic.kernels import digit_blocks
from moe_prism.elastic.selection import Selection
from moe_prism.errors import CheckpointError, PrismError
from moe_prism.experts.shadow import from_planes, to_planes
from moe_prism.offload import load_offloaded, plain, set_deadline, set_stored
from moe_prism.offload.block_file import BlockFile
from moe_prism.offload.guessing import Guessing
from moe_prism.offload.load import attach_blocks, attach_shadow, load_resident
from moe_prism.offload.pace import Pace, Shadow
from moe_prism.offload.parts import blocks_of
from moe_prism.offload.plan import plan


@pytest.fixture(autouse=True)
def always_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models this small hardly wait, so that nothing would be read ahead."""
    monkeypatch.setattr(Guessing, "worth", True)


@dataclass
class Noted:
    """A limiter that leaves nothing out and notes what is beyond a token's best."""

    floor: int
    low: dict[int, Tensor] = field(default_factory=dict)

    def limits(self, tokens: int) -> bool:
        return True

    def limit(self, layer: int, scores: Tensor, chosen: Tensor, floor: Tensor, index: Tensor) -> Tensor:
        self.low[layer] = chosen & ~floor
        return chosen


class TwoPrecisions(Executor):
    """The oracle: the reference executor on the stored weights, and again on rounded ones, in memory."""

    def __init__(self, noted: Noted, model: torch.nn.Module, rounded: torch.nn.Module) -> None:
        pairs = zip(elastic_layers(model), elastic_layers(rounded), strict=True)
        self.noted, self.twins = noted, {id(a[0].module): (a[1].number, b[0].module) for a, b in pairs}

    def refusal(self, module, x) -> None:
        return None

    def run(self, module, x, selection, n, computed=None) -> Tensor:
        number, twin = self.twins[id(module)]
        low = self.noted.low[number][selection.token, selection.slot, selection.sub_expert % n]
        reference = EXECUTORS.create("reference")
        parts = [(module, ~low), (twin, low)]
        return sum(reference.run(m, x, Selection(*(v[mine] for v in selection)), n) for m, mine in parts)


def oracle(made: Packed, k_stored: int, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """The checkpoint in memory, with all but each token's best sub-experts rounded to 4 bits."""
    model, rounded = (load_elastic(made.elastic, executor="reference", fast_linear=False) for _ in "ab")
    with torch.no_grad():
        for layer, _ in elastic_layers(rounded):
            layer.module.gate_up_proj.copy_(from_planes(to_planes(layer.module.gate_up_proj), 4))
            down = layer.module.down_proj.transpose(1, 2)  # rows of a neuron
            layer.module.down_proj.copy_(from_planes(to_planes(down), 4).transpose(1, 2))
    noted = Noted(k_stored)
    dial_of(model).limiter = noted
    both = TwoPrecisions(noted, model, rounded)

    def chosen(name: str, module: torch.nn.Module, *_: object) -> Executor:
        if id(module) in both.twins:
            return both
        return EXECUTORS.create("reference" if blocks_of(module) is None else "offload")

    monkeypatch.setattr("moe_prism.elastic.layer.choose_executor", chosen)
    return model


@pytest.mark.parametrize(("family", "unpack_from"), [("olmoe", 64), ("qwen3_moe", 3)])
def test_the_best_run_as_stored_and_the_others_at_4_bits(family: str, unpack_from: int, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plain, "_UNPACK_FROM", unpack_from)
    made = packed(family, tmp_path, shadow_bits=4)
    model, _ = load_resident(made.packed, "auto")
    stored = attach_blocks(model, BlockFile(made.packed / "blocks"), 17)
    attach_shadow(model, stored, BlockFile(made.packed / "shadow.blocks"), 19)
    exact = load_elastic(made.elastic, executor="reference", fast_linear=False)
    for k_active, k_stored in ((7, 3), (16, 1), (4, 6)):
        set_stored(model, k_stored)
        with monkeypatch.context() as patch:
            original = oracle(made, k_stored, patch)
            with budget(original, k_active), budget(model, k_active), budget(exact, k_active):
                found, wanted = logits(model, batch=2, length=12), logits(original, batch=2, length=12)
                assert (found - wanted).abs().max() < 1e-4
                unlike = (found - logits(exact, batch=2, length=12)).abs().max()
                assert (unlike > 1e-3) == (k_stored < k_active)  # 4 bits can be told from all
    set_stored(model, None)
    assert (logits(model) - logits(exact)).abs().max() < 1e-4
    stored.close()


def test_what_is_in_memory_changes_nothing(tmp_path) -> None:
    made = packed("olmoe", tmp_path, shadow_bits=4)
    found = []
    for slots, low, readers, ahead in ((16, 16, 1, False), (17, 64, 3, True), (64, 20, 2, True)):
        model, _ = load_resident(made.packed, "auto")
        stored = attach_blocks(model, BlockFile(made.packed / "blocks"), slots, readers=readers, read_ahead=ahead)
        shadow = attach_shadow(
            model, stored, BlockFile(made.packed / "shadow.blocks"), low, rule="frequent-recent", readers=readers
        )
        set_stored(model, 3)
        with budget(model, 9):
            found += [logits(model), logits(model), logits(model, batch=1, length=1)]
            wanted = model.generate(tokens(1, 5), max_new_tokens=12, do_sample=False)
        found.append(wanted)
        assert stored.statistics is shadow.statistics
        assert not stored.cache.held
        assert not shadow.cache.held
        stored.close()
        assert not any(thread.is_alive() for thread in (*stored.readers, *shadow.readers))
    assert all(torch.equal(found[i], found[i % 4]) for i in range(len(found)))


def test_an_altered_copy_is_named_and_the_model_goes_on(tmp_path) -> None:
    made = packed("olmoe", tmp_path, shadow_bits=4)
    path = made.packed / "shadow.blocks"
    with BlockFile(path) as file:
        layout = file.layout
    content = bytearray(path.read_bytes())
    for block in range(layout.blocks):
        content[layout.offset(block)] ^= 1
    path.write_bytes(content)
    model, _ = load_resident(made.packed, "auto")
    stored = attach_blocks(model, BlockFile(made.packed / "blocks"), 16)
    shadow = attach_shadow(model, stored, BlockFile(path), 16)
    set_stored(model, 2)
    with budget(model, 8):
        with pytest.raises(CheckpointError, match=r"shadow\.blocks: the block at offset .* is not what was written"):
            logits(model)
        assert not stored.cache.held
        assert not shadow.cache.held
        set_stored(model, None)
        original = load_elastic(made.elastic, executor="reference", fast_linear=False)
        with budget(original, 8):
            assert (logits(model) - logits(original)).abs().max() < 1e-4
    stored.close()


def test_under_a_deadline_a_miss_is_read_at_4_bits_first(tmp_path) -> None:
    made = packed("olmoe", tmp_path, shadow_bits=4)
    model, _ = load_resident(made.packed, "auto")
    stored = attach_blocks(model, BlockFile(made.packed / "blocks"), 16, read_ahead=False)
    shadow = attach_shadow(model, stored, BlockFile(made.packed / "shadow.blocks"), 64)
    one = tokens(1, 1)
    set_stored(model, 1)
    with budget(model, 12), torch.no_grad():
        model(one)  # its copies are in memory from now on
        pace = set_deadline(model, 1e-6, k_min=3)
        assert pace is not None
        model(one)
        pace.ran = pace.low = pace.places = 0
        model(one)
    assert pace.mean_budget == 12  # what is in memory takes no reading, at 4 bits neither
    assert 0 < pace.mean_low <= 9  # the floor never does
    assert shadow.statistics.misses > 0
    stored.close()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_time_goes_to_copies_first_and_then_to_stored_blocks(data) -> None:
    now = 0.0
    pace = Pace(1, 1.0, lambda: 0.0, lambda: now)
    pace.seconds = data.draw(st.floats(0.5, 30))
    part = data.draw(st.sampled_from([0.28125, 0.5]))
    scores = torch.tensor(data.draw(st.permutations(range(16))), dtype=torch.float32)[None]
    order = scores[0].argsort(descending=True)
    floor, count = data.draw(st.integers(1, 8)), data.draw(st.integers(8, 16))
    chosen, sure = torch.zeros(2, 1, 16, dtype=torch.bool)
    chosen[0, order[:count]], sure[0, order[:floor]] = True, True
    here, low_here = (set(data.draw(st.lists(st.integers(0, 15)))) for _ in "ab")
    blocks = torch.arange(16)[None]
    for number in range(2):  # of the first token nothing is known
        runs, low = pace.choose(0, scores, chosen, sure, blocks, here.__contains__, Shadow(part, low_here.__contains__))
        assert not (low & ~runs).any()
        assert not (low & sure).any()
        assert (runs | ~sure).all()
        assert not (runs & ~chosen).any()
        free = torch.tensor([[b in here or b in low_here for b in range(16)]])
        assert (runs | ~(chosen & free)).all()
        assert not low[0, sorted(here)].any()  # what is in memory as stored runs as stored
        must = sum(b not in here for b in order[:floor].tolist())
        extra = [b for b in blocks[runs & ~sure].tolist() if b not in here]
        costs = [(part if b not in low_here else 0.0) if low[0, b] else 1.0 for b in extra]
        if any(costs):
            assert number == 1
            assert must + sum(costs) <= pace.seconds + 1e-6
        missed = [float(scores[0, b]) for b in blocks[chosen & ~runs].tolist()]
        read = [float(scores[0, b]) for b in extra if low[0, b] and b not in low_here]
        assert not missed or not read or min(read) > max(missed)


@pytest.mark.parametrize(("hidden", "size", "threads"), [(32, 3, 1), (192, 24, 2), (96, 1, 2)])
def test_the_kernel_is_the_arithmetic_of_the_rounded_rows(hidden: int, size: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    planes = to_planes(torch.randn(5, 3 * size, hidden, generator=generator))
    rows = torch.cat([planes.upper, planes.scale.contiguous().view(torch.uint8)], dim=2).flatten(1).numpy()
    slab = np.zeros((5, -(-rows.shape[1] // 4096) * 4096), np.uint8)
    slab[:, : rows.shape[1]] = rows
    x, weight = torch.randn(3, hidden, generator=generator), torch.rand(7, generator=generator)
    token, slot = torch.tensor([0, 0, 1, 2, 2, 1, 0]), torch.tensor([4, 1, 1, 0, 2, 3, 4])
    out, before = np.full((7, hidden), 7.0, np.float32), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        at = np.array([0, 2, 3, 6])
        digit_blocks(
            slab, slab.view(np.uint16), x.numpy(), token.numpy(), weight.numpy(), at, slot.numpy()[at], size, out
        )
    finally:
        torch.set_num_threads(before)
    gate, up, down = from_planes(planes, 4).double().chunk(3, dim=1)
    for pair in range(7):
        v, block = x[token[pair]].double(), slot[pair]
        wanted = (torch.nn.functional.silu(gate[block] @ v) * (up[block] @ v) * weight[pair]) @ down[block]
        if pair not in at:
            wanted = torch.full_like(wanted, 7.0)
        torch.testing.assert_close(torch.from_numpy(out[pair]).double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_plan_counts_both_kinds(tmp_path) -> None:
    made = packed("olmoe", tmp_path, shadow_bits=4)
    model, _ = load_resident(made.packed, "auto")
    stored = attach_blocks(model, BlockFile(made.packed / "blocks"), 16)
    attach_shadow(model, stored, BlockFile(made.packed / "shadow.blocks"), 64)
    ids = tokens(1, 64)[0]
    alone, mixed = (plan(model, ids, [2, 12], k_stored=k).points for k in (None, 2))
    assert mixed[0].hit_rate == alone[0].hit_rate  # a budget within k_stored reads what it always did
    assert mixed[1].hit_rate > alone[1].hit_rate
    assert mixed[1].read_seconds < alone[1].read_seconds
    stored.close()


def test_what_has_no_copy_is_refused(tmp_path) -> None:
    made = packed("olmoe", tmp_path)
    with pytest.raises(CheckpointError, match=r"no copy at 4 bits.*--shadow-bits 4"):
        load_offloaded(made.packed, 8_000_000_000, shadow=0.5)
    with pytest.raises(PrismError, match="above 0 and below 1, got 1"):
        load_offloaded(made.packed, 8_000_000_000, shadow=1.0)
    model = load_offloaded(made.packed, 8_000_000_000)
    with pytest.raises(PrismError, match="no copy at 4 bits"):
        set_stored(model, 3)
    with pytest.raises(PrismError, match="is in memory"):
        set_stored(load_elastic(made.elastic), 3)
    with pytest.raises(PrismError, match="only experts of the usual kind"):
        packed("gpt_oss", tmp_path / "other", shadow_bits=4)
    with pytest.raises(PrismError, match="skips neurons"):
        packed("olmoe", tmp_path / "neurons", shadow_bits=4, solver="importance", neurons="gate-first")


def test_memory_is_shared_out(tmp_path) -> None:
    made = packed("olmoe", tmp_path, shadow_bits=4)
    model = load_offloaded(made.packed, 8_000_000_000, shadow=0.5)
    set_stored(model, 1)
    assert dial_of(model).limiter is not None
    set_stored(model, 16)
    assert dial_of(model).limiter is None  # all of the budget
    with pytest.raises(PrismError, match=r"0\.10 GB is too small.*raise --memory"):
        load_offloaded(made.packed, 100_000_000, shadow=0.5)

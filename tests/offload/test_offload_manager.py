from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import block_file, content

from moe_prism.errors import CheckpointError, PrismError
from moe_prism.offload.block_file import BlockFile
from moe_prism.offload.eviction import EVICTION, Belady, LeastRecentlyUsed
from moe_prism.offload.guessing import Guessing
from moe_prism.offload.manager import Manager
from moe_prism.offload.tiers import MemoryTier

RULES = ["lru", "lfu-decay", "gate-aware", "frequent-recent"]


def take(manager: Manager, blocks: list[int]) -> dict[int, bytes]:
    """Run a step; what every block held when it was ready."""
    stride, found = manager.layout.stride, {}
    with manager.step(blocks, [1.0] * len(blocks)) as step:
        for batch in step:
            for ready in batch:
                rows = manager.tier.rows()[
                    ready.slot * manager.tier.rows_per_slot : (ready.slot + 1) * manager.tier.rows_per_slot
                ]
                found[blocks[ready.position]] = rows.tobytes()
                assert len(rows.tobytes()) == stride
    return found


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_step_gets_its_blocks_whatever_was_cached_or_read_ahead(tmp_path_factory, data) -> None:
    path = tmp_path_factory.mktemp("blocks") / "blocks"
    layout = block_file(path)
    rule = data.draw(st.sampled_from(RULES))
    slots, readers = data.draw(st.integers(2, 10)), data.draw(st.integers(1, 4))
    with Manager(MemoryTier(BlockFile(path), slots), EVICTION.create(rule), readers) as manager:
        required = 0
        for _ in range(data.draw(st.integers(1, 12))):
            layer = data.draw(st.integers(0, 1)) * layout.per_layer
            inside = st.integers(layer, layer + layout.per_layer - 1)
            wanted = data.draw(st.lists(inside, unique=True, min_size=1, max_size=min(slots, layout.per_layer)))
            if data.draw(st.booleans()):
                manager.read_ahead(data.draw(st.lists(inside, max_size=8)))
            assert take(manager, wanted) == {block: content(path, layout, block) for block in wanted}
            required += len(wanted)
            assert not manager.cache.held
            assert len(set(manager.cache.place.values())) == len(manager.cache.place) <= slots
        counted = manager.statistics
        assert counted.hits + counted.misses == required
        assert counted.bytes_read == (counted.blocks_read + counted.cancelled) * layout.stride
        assert 0 <= counted.precision <= 1
        assert 0 <= counted.recall <= 1


def test_a_block_in_use_is_never_evicted(tmp_path) -> None:
    layout = block_file(tmp_path / "blocks")
    with Manager(MemoryTier(BlockFile(tmp_path / "blocks"), 2), LeastRecentlyUsed()) as manager:
        with manager.step([0, 1], [1.0, 1.0]) as step:
            batch = next(iter(step))
            manager.read_ahead(range(layout.per_layer, layout.per_layer + 4))
            time.sleep(0.05)
            assert set(manager.cache.place) == {0, 1} or len(batch) == 1
        assert take(manager, [5, 6]).keys() == {5, 6}
        with pytest.raises(PrismError, match=r"needs 3 blocks at once, the cache holds 2"):
            manager.step([0, 1, 2], [1.0] * 3)


def test_belady_never_misses_more_than_any_other_rule() -> None:
    """Against brute force over all choices of victims, on short random traces."""

    def fewest(trace: tuple[int, ...], held: frozenset[int], slots: int) -> int:
        if not trace:
            return 0
        block, rest = trace[0], trace[1:]
        if block in held:
            return fewest(rest, held, slots)
        if len(held) < slots:
            return 1 + fewest(rest, held | {block}, slots)
        return 1 + min(fewest(rest, held - {out} | {block}, slots) for out in held)

    from moe_prism.offload.cache import BlockCache

    rng = np.random.default_rng(0)
    for _ in range(30):
        trace = rng.integers(0, 5, 9).tolist()
        cache = BlockCache(2, Belady(trace))
        misses = 0
        for block in trace:
            cache.rule.used(np.array([block]), np.ones(1), 0.0)
            if not cache.ready(block):
                misses += 1
                assert cache.admit(block) is not None
                cache.arrived(block)
        assert misses == fewest(tuple(trace), frozenset(), 2)


def test_reads_ahead_are_counted_and_those_nobody_needs_are_forgotten(tmp_path) -> None:
    block_file(tmp_path / "blocks")
    with Manager(MemoryTier(BlockFile(tmp_path / "blocks"), 6), LeastRecentlyUsed()) as manager:
        manager.read_ahead([0, 1, 2])
        while manager.statistics.blocks_read < 3:
            time.sleep(0.001)
        take(manager, [1, 2, 3])
        counted = manager.statistics
        assert (counted.hits, counted.misses) == (2, 1)
        assert (counted.predicted, counted.predicted_right, counted.foreseeable) == (3, 2, 3)
        assert counted.precision == pytest.approx(2 / 3)


class Slow(BlockFile):
    """Waits in the middle of every block until it is told to go on."""

    def __init__(self, path) -> None:
        super().__init__(path)
        self.go = threading.Event()

    def _read(self, block, into, go_on) -> bool:
        def wait(count: int) -> bool:
            self.go.wait(10)
            return go_on(count)

        return super()._read(block, into, wait)


def test_a_read_ahead_that_turns_out_wrong_is_ended_and_one_that_is_required_after_all_is_not(tmp_path) -> None:
    layout = block_file(tmp_path / "blocks")
    file = Slow(tmp_path / "blocks")
    with Manager(MemoryTier(file, 8), LeastRecentlyUsed(), readers=2) as manager:
        manager.read_ahead([0, 1])
        while len(manager.cache.place) < 2:
            time.sleep(0.001)
        step = manager.step([1, 2], [1.0, 1.0])
        file.go.set()
        with step:
            assert sum(len(batch) for batch in step) == 2
        counted = manager.statistics
        assert (counted.ahead, counted.ahead_right, counted.cancelled) == (2, 1, 1)
        assert 0 not in manager.cache.place
        assert not manager.cache.promised
        assert take(manager, [0])[0] == content(tmp_path / "blocks", layout, 0)


def test_guesses_that_are_always_wrong_are_given_up_and_tried_again_now_and_then(tmp_path) -> None:
    layout = block_file(tmp_path / "blocks")
    with Manager(MemoryTier(BlockFile(tmp_path / "blocks"), 3), LeastRecentlyUsed()) as manager:
        for number in range(100):
            take(manager, [0])
            manager.read_ahead([layout.per_layer + 1 + number % 6])
            time.sleep(0.001)
            take(manager, [layout.per_layer])
        assert 0 < manager.statistics.ahead < 40
        assert manager.statistics.predicted == 100


def test_what_was_read_ahead_does_not_make_room_for_other_reads_ahead(tmp_path) -> None:
    layout = block_file(tmp_path / "blocks", experts=8)
    with Manager(MemoryTier(BlockFile(tmp_path / "blocks"), 4), LeastRecentlyUsed(), readers=1) as manager:
        take(manager, [0, 1])
        manager.read_ahead(range(layout.per_layer, layout.per_layer + 8))
        while len(manager.cache.promised) < 4:
            time.sleep(0.001)
        time.sleep(0.02)
        first = set(range(layout.per_layer, layout.per_layer + 4))
        assert set(manager.cache.place) == first
        assert take(manager, [4]).keys() == {4}  # somebody waits: now one of them goes


class Faulty(BlockFile):
    """Fails to read given blocks, a given number of times."""

    def __init__(self, path, failures: dict[int, int]) -> None:
        super().__init__(path)
        self.failures = failures

    def _read(self, block, into, go_on) -> bool:
        if self.failures.get(block, 0) > 0:
            self.failures[block] -= 1
            raise OSError("injected")
        return super()._read(block, into, go_on)


@pytest.mark.parametrize("block", range(16))
def test_a_failed_read_is_repeated_once_then_raised_and_the_manager_goes_on(block: int, tmp_path) -> None:
    path = tmp_path / "blocks"
    layout = block_file(path)
    layer = block // layout.per_layer * layout.per_layer
    wanted = list(range(layer, layer + layout.per_layer))
    with Manager(MemoryTier(Faulty(path, {block: 1}), 8), LeastRecentlyUsed()) as manager:
        assert take(manager, wanted)[block] == content(path, layout, block)
    with Manager(MemoryTier(Faulty(path, {block: 2}), 8), LeastRecentlyUsed()) as manager:
        with pytest.raises(CheckpointError, match=rf"{path} at offset {layout.offset(block)} .*failed twice: injected"):
            take(manager, wanted)
        assert not manager.cache.held
        assert take(manager, wanted) == {b: content(path, layout, b) for b in wanted}


def test_an_altered_block_is_named_and_never_used(tmp_path) -> None:
    path = tmp_path / "blocks"
    layout = block_file(path)
    with path.open("r+b") as file:
        file.seek(layout.offset(5) + 7)
        file.write(b"x")
    with Manager(MemoryTier(BlockFile(path), 8), LeastRecentlyUsed()) as manager:
        with pytest.raises(CheckpointError, match=r"layer0, expert 2, sub-expert 1.*not what was written"):
            take(manager, [4, 5])
        assert take(manager, [4, 6]).keys() == {4, 6}


def test_a_file_truncated_under_a_running_process_is_an_error_not_garbage(tmp_path) -> None:
    path = tmp_path / "blocks"
    layout = block_file(path)
    with Manager(MemoryTier(BlockFile(path), 8), LeastRecentlyUsed()) as manager:
        take(manager, [0])
        with path.open("r+b") as file:
            file.truncate(layout.offset(9))
        assert take(manager, [0, 1]).keys() == {0, 1}
        with pytest.raises(CheckpointError, match="failed twice: the file ends at"):
            take(manager, [10])
        path.unlink()  # deleted: the open file stays readable
        assert take(manager, [8]).keys() == {8}


def test_an_interrupted_step_lets_go_of_its_blocks(tmp_path) -> None:
    block_file(tmp_path / "blocks")
    with Manager(MemoryTier(BlockFile(tmp_path / "blocks"), 8), LeastRecentlyUsed()) as manager:

        def interrupted() -> None:
            with manager.step([0, 1, 2], [1.0] * 3) as step:
                for _ in step:
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert not manager.cache.held
        assert take(manager, [0, 1, 2, 3]).keys() == {0, 1, 2, 3}


def test_two_managers_share_one_file(tmp_path) -> None:
    path = tmp_path / "blocks"
    layout = block_file(path)
    results: list[dict[int, bytes]] = []

    def work() -> None:
        with Manager(MemoryTier(BlockFile(path), 3), LeastRecentlyUsed()) as manager:
            for block in list(range(8)) * 3:
                results.append(take(manager, [block]))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 48
    assert all(found == {b: content(path, layout, b) for b in found} for found in results)


def test_guesses_are_made_while_steps_wait_for_longer_than_they_cost() -> None:
    guessing, stalled = Guessing(), 0.0
    assert guessing.worth  # nothing is known: the first guess says what one costs
    guessing.step(stalled)
    guessing.cost(1e-3)
    assert not guessing.worth
    for waits, worth in ((5e-3, True), (0.0, False), (1.9e-3, False), (2.2e-3, True)):
        for _ in range(2000):
            stalled += waits
            guessing.step(stalled)
        assert guessing.worth == worth


def test_a_slow_first_guess_is_not_the_last() -> None:
    guessing, stalled, guesses = Guessing(), 0.0, 0
    for _ in range(400):  # steps wait for 2 ms, a guess takes 0.1 ms, and the first one half a second
        stalled += 2e-3
        guessing.step(stalled)
        if guessing.worth:
            guessing.cost(1e-4 if guesses else 0.5)
            guesses += 1
    assert guesses > 200

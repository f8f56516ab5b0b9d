"""Which memory is asked for in huge pages, and that its contents stay."""

from __future__ import annotations

import pytest
import torch

from moe_prism import huge_pages
from moe_prism.huge_pages import SIZE, prefer_huge_pages, use_huge_pages


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize(("address", "size"), [(SIZE, 3 * SIZE), (SIZE + 64, 3 * SIZE), (64, SIZE + 1), (5, 0)])
def test_only_whole_pages_inside_are_named(
    address: int, size: int, failing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, int]] = []

    def advise(first: int, length: int, advice: int) -> int:
        asked.append((first, length, advice))
        return -failing

    monkeypatch.setattr(huge_pages, "_madvise", lambda: advise)
    use_huge_pages(address, size)
    prefer_huge_pages(address, size)
    whole = [page for page in range(0, 8 * SIZE, SIZE) if address <= page and page + SIZE <= address + size]
    if not whole:
        assert not asked
        return
    advices = [25, 14, 14] if failing else [25, 14]  # now; else when the kernel finds the time
    assert asked == [(whole[0], len(whole) * SIZE, advice) for advice in advices]


def test_contents_stay() -> None:
    numbers = torch.arange(3_000_000)
    use_huge_pages(numbers.data_ptr(), numbers.nbytes)
    assert torch.equal(numbers, torch.arange(3_000_000))

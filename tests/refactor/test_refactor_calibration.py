from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_prism.errors import PrismError
from moe_prism.refactor.calibration import PARTS, load_calibration


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def windows(path: Path, seed: int, tokens: int = 512) -> torch.Tensor:
    return load_calibration(str(path), Letters(), None, tokens, 64, seed).windows


def test_another_seed_is_another_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(0x4E00 + i) for i in range(20_000)), encoding="utf-8")  # no character twice
    found = [windows(path, seed) for seed in range(PARTS + 1)]
    assert [part.shape for part in found] == [torch.Size([8, 64])] * (PARTS + 1)
    assert found[0].flatten().tolist() == [0x4E00 + i for i in range(512)]
    assert len(torch.cat(found[:PARTS]).unique()) == PARTS * 512  # no token is in two of them
    assert torch.equal(found[PARTS], found[0])
    assert torch.equal(windows(path, 3), found[3])


@pytest.mark.parametrize(("characters", "parts"), [(300, 1), (600, 1), (1100, 2)])
def test_a_short_text_has_fewer_parts(characters: int, parts: int, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(0x4E00 + i) for i in range(characters)), encoding="utf-8")
    found = [windows(path, seed) for seed in range(4)]
    for seed in range(4):
        assert torch.equal(found[seed], found[seed % parts])
    assert len({part[0, 0].item() for part in found}) == parts


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" * 255)
    with pytest.raises(PrismError, match="has 255 tokens; at least 256"):
        windows(path, 1)

"""Reading, tokenising and cutting evaluation text."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moe_prism.errors import PrismError
from moe_prism.evaluation.text import read_text, text_name, tokenize, windows

SAMPLE = "The quick brown fox jumps over the lazy dog, again and again.\nA second line of it: 1234!\n"


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([SAMPLE], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_plain_xz_and_directory_give_the_same_text(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(SAMPLE, encoding="utf-8")
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress("Grüße".encode()))
    (tmp_path / "ignored.bin").write_bytes(b"\xff\xfe")
    assert read_text(tmp_path / "b.txt") == SAMPLE
    assert read_text(tmp_path / "a.txt.xz") == "Grüße"
    assert read_text(tmp_path) == "Grüße\n" + SAMPLE  # by name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"  \n", "is empty"),
        ("latin.txt", "Grüße".encode("latin-1"), "not UTF-8"),
        ("cut.txt.xz", lzma.compress(SAMPLE.encode())[:-20], "not a whole xz"),
    ],
)
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PrismError, match=message) as caught:
        read_text(tmp_path / name)
    assert name in str(caught.value)


def test_missing_text_and_textless_directory(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match=r"nowhere\.txt.*does not exist"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(PrismError, match="holds no text"):
        read_text(tmp_path)


def test_name_is_short(tmp_path: Path) -> None:
    assert text_name(tmp_path / "gutenberg" / "valid.txt.xz") == "gutenberg/valid.txt.xz"


@settings(max_examples=50, deadline=None)
@given(words=st.lists(st.text(min_size=1, max_size=12), max_size=400), wanted=st.integers(1, 300))
def test_tokens_are_a_prefix_of_all_tokens(bpe: PreTrainedTokenizerFast, words: list[str], wanted: int) -> None:
    text = " ".join(words)
    everything = bpe(text, add_special_tokens=False)["input_ids"]
    assert tokenize(bpe, text) == everything
    assert tokenize(bpe, text, wanted) == everything[:wanted]


def test_only_a_piece_of_a_long_text_is_tokenised(bpe: PreTrainedTokenizerFast) -> None:
    seen: list[int] = []

    def spy(text: str, **options: object) -> dict[str, list[int]]:
        seen.append(len(text))
        ids: dict[str, list[int]] = bpe(text, **options)
        return ids

    text = SAMPLE * 10_000
    assert tokenize(spy, text, 500) == bpe(SAMPLE * 100, add_special_tokens=False)["input_ids"][:500]
    assert sum(seen) < len(text) / 20


def test_tokens_below_one() -> None:
    with pytest.raises(PrismError, match="at least 1, got 0"):
        tokenize(None, SAMPLE, 0)


@given(length=st.integers(2, 200), context=st.integers(1, 60))
def test_windows_predict_every_token_once(length: int, context: int) -> None:
    ids = list(range(length))
    if length <= context:
        with pytest.raises(PrismError, match=f"{length} tokens.*needs {context + 1}"):
            windows(ids, context)
        return
    cut = windows(ids, context)
    assert cut.dtype == torch.int64
    assert cut.shape[1] == context + 1
    targets = cut[:, 1:].flatten().tolist()
    assert targets == list(range(1, 1 + cut.shape[0] * context))
    assert length - 1 - len(targets) < context  # only a short last window is dropped
    assert torch.equal(cut[:, 1:] - 1, cut[:, :-1])


def test_context_below_one() -> None:
    with pytest.raises(PrismError, match="context must be at least 1"):
        windows([1, 2, 3], 0)

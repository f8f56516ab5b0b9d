from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from moe_prism.serving.detokenise import Detokeniser

TOKENIZER = AutoTokenizer.from_pretrained(Path(__file__).parents[2] / "models" / "reference")
# bytes of characters that need two, three and four of them, split over tokens
HARD = TOKENIZER.encode("naïve — „Straße“ 日本語 🙂🙃 e\u0301")


def decoded(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def pieces(ids: list[int], stops: tuple[str, ...] = (), prompt: tuple[int, ...] = ()) -> tuple[list[str], Detokeniser]:
    text = Detokeniser(TOKENIZER, prompt, stops)
    return [*(text.add(token) for token in ids), text.finish()], text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 4095), st.sampled_from(HARD)), max_size=60))
def test_pieces_add_up_to_the_decoded_whole(ids: list[int]) -> None:
    got, text = pieces(ids)
    assert "".join(got) == decoded(ids)
    assert text.length == len("".join(got))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 4095), st.sampled_from(HARD)), max_size=60), st.integers(0, 60))
def test_the_last_tokens_may_come_at_once(ids: list[int], single: int) -> None:
    text = Detokeniser(TOKENIZER)
    got = [*(text.add(token) for token in ids[:single]), text.finish(ids[single:])]
    assert "".join(got) == decoded(ids)
    assert text.length == len("".join(got))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(HARD + TOKENIZER.encode("the sea and the ship")), max_size=40), st.data())
def test_it_ends_before_the_first_complete_stop_text_and_never_shows_a_part_of_it(
    ids: list[int], data: st.DataObject
) -> None:
    whole = decoded(ids)
    inside = st.integers(0, max(0, len(whole) - 1)).flatmap(
        lambda at: st.integers(1, 6).map(lambda n: whole[at : at + n] or "x")
    )
    stops = tuple(data.draw(st.lists(st.one_of(inside, st.sampled_from(["zzz", "the", " a"])), min_size=1, max_size=3)))
    got, text = pieces(ids, stops)
    # one character at a time: the first prefix of the whole that ends with a stop text
    ends = [[n - len(stop) for stop in stops if whole[:n].endswith(stop)] for n in range(1, len(whole) + 1)]
    first = next((starts for starts in ends if starts), None)
    assert "".join(got) == (whole if first is None else whole[: min(first)])
    assert text.stopped == (first is not None)


@pytest.mark.parametrize("stops", [("nan", "a"), ("a", "nan")])
def test_the_stop_text_that_is_complete_first_ends_the_text_however_tokens_are_cut(stops: tuple[str, str]) -> None:
    whole, single = TOKENIZER.encode("nan"), [token for letter in "nan" for token in TOKENIZER.encode(letter)]
    for ids in (whole, single):
        got, _ = pieces(ids, stops)
        assert "".join(got) == "n"


def test_no_piece_ends_inside_a_character() -> None:
    got, _ = pieces(HARD)
    assert "".join(got) == decoded(HARD)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in got)


def test_text_is_held_only_while_it_may_become_a_stop_text() -> None:
    text = Detokeniser(TOKENIZER, stops=["\n\nUser:"])
    ids = TOKENIZER.encode("one\n\ntwo three")
    out = [text.add(token) for token in ids]
    assert "".join(out) == "one\n\ntwo three"


@pytest.mark.parametrize("prompt", ["The sea", "日本"])
def test_the_prompt_is_not_repeated(prompt: str) -> None:
    before, after = TOKENIZER.encode(prompt), TOKENIZER.encode(" was calm")
    got, _ = pieces(after, prompt=tuple(before))
    assert "".join(got) == " was calm"

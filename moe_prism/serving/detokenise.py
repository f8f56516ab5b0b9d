"""Tokens become text one by one, and stop texts end it.

What has been given out is never taken back: an unfinished character and anything that may turn out to be the start of
a stop text are held until it is certain. Knows nothing of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# Tokens of context that a decoder needs to place a space or finish a character; the text is the same with more. Beyond
# the second number the window begins anew: until then the text in front of a token is known from the one before.
_CONTEXT, _WINDOW = 6, 32


class Detokeniser:
    """The text of one output.

    The pieces given out add up to the decoded output, cut before the stop text that is complete first; of two that are
    complete at the same character, the one that begins first. So the cut does not depend on where tokens end.

    Args:
        tokenizer: of transformers.
        prompt: the tokens in front, for the spacing of the first one.
        stops: texts that end the output; they are not part of it.

    Attributes:
        stops: those that are not empty.
        stopped: whether a stop text was found; nothing more comes then.
        length: characters given out so far.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        self._ids: list[int] = list(prompt[-_CONTEXT:])
        self._done = len(self._ids)  # tokens whose text is known; the window that is decoded is all of them
        self._before: str | None = None  # their text, once it is needed
        self._whole = ""  # text of all, of the last decoding
        self._held = ""
        self.stopped = False
        self.length = 0

    def add(self, token: int) -> str:
        """The text that is certain after this token; often one piece, sometimes none."""
        if self.stopped:
            return ""
        self._ids.append(token)
        text = self._decoded()
        if text.endswith(_UNFINISHED) and len(self._ids) - self._done < 8:  # a character has 4 bytes at most
            return ""
        return self._given(text)

    def finish(self, tokens: Sequence[int] = ()) -> str:
        """The rest, once no token follows: after these, whose text is not cut by a stop text."""
        if self.stopped:
            return ""
        self._ids += tokens
        held = self._given(self._decoded())
        rest, self._held = self._held, ""
        if self.stopped:
            return held
        self.length += len(rest)
        return held + rest

    def _decoded(self) -> str:
        """Text of the tokens after ``_done``: what the window gains by them."""
        if self._done == len(self._ids):
            return ""
        if self._before is None:
            self._before = self._text(self._ids[: self._done])
        self._whole = self._text(self._ids)
        return self._whole[len(self._before) :]

    def _given(self, text: str) -> str:
        if self._done < len(self._ids):
            self._before = self._whole
        if len(self._ids) > _WINDOW:
            del self._ids[: max(0, self._done - _CONTEXT)]
            self._before = None
        self._done = len(self._ids)
        if not self.stops:
            self.length += len(text)
            return text
        text = self._held + text
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            text = text[: min(found)[1]]
        else:
            hold = max(_overlap(text, stop) for stop in self.stops)
            text, self._held = text[: len(text) - hold], text[len(text) - hold :]
        self.length += len(text)
        return text

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0

"""A chat becomes a prompt: by the tokenizer's own template, or by a plain one where the model has none.

The plain one writes a system message as it is and the others as ``User: ...`` and ``Assistant: ...``, one blank line
apart, ends with ``Assistant:``, and a new ``User:`` ends the output. It lets base models be tried; nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2

from ..errors import PrismError
from .schema import Message

PLAIN_STOPS = ("\nUser:", "\nAssistant:")
_NAMES = {"user": "User", "assistant": "Assistant"}


class ChatPrompt(NamedTuple):
    """A chat as text.

    Attributes:
        text: the prompt.
        stops: texts that end the output.
        complete: whether the text has its special tokens already.
    """

    text: str
    stops: tuple[str, ...]
    complete: bool


def chat_prompt(tokenizer: Any, messages: Sequence[Message]) -> ChatPrompt:
    """The prompt of a chat.

    Raises:
        PrismError: the model's template refuses these messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return ChatPrompt(_plain(messages), PLAIN_STOPS, False)
    turns = [{"role": message.role, "content": message.text} for message in messages]
    try:
        prompt: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise PrismError(f"messages: the model's chat template refuses them: {error}") from None
    return ChatPrompt(prompt, (), True)


def _plain(messages: Sequence[Message]) -> str:
    turns = [f"{_NAMES[m.role]}: {m.text}" if m.role in _NAMES else m.text for m in messages]
    return "\n\n".join([*turns, "Assistant:"])

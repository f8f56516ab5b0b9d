from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from moe_prism.errors import PrismError
from moe_prism.serving.chat import PLAIN_STOPS, chat_prompt
from moe_prism.serving.schema import Message

CHAT = [Message(role="system", content="Be brief."), Message(role="user", content=[{"type": "text", "text": "Hi"}])]


@pytest.fixture
def tokenizer(checkpoint: Path):
    return AutoTokenizer.from_pretrained(checkpoint)


def test_the_plain_template(tokenizer) -> None:
    assert chat_prompt(tokenizer, CHAT) == ("Be brief.\n\nUser: Hi\n\nAssistant:", PLAIN_STOPS, False)


def test_the_models_own_template_wins(tokenizer) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<go>{% endif %}"
    )
    assert chat_prompt(tokenizer, CHAT) == ("<system>Be brief.<user>Hi<go>", (), True)


def test_what_the_template_refuses_is_bad_input(tokenizer) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PrismError, match="roles must alternate"):
        chat_prompt(tokenizer, CHAT)

"""Multiple choice against a forward pass of its own for every choice."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from making import WORDS, save_stock
from tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_prism.errors import PrismError
from moe_prism.evaluation import choices
from moe_prism.evaluation.choices import Question, answer, load_questions
from moe_prism.evaluation.measure import Run


def questions(seed: int, count: int = 30) -> list[Question]:
    """Random words: some questions with one context, some with a context for each choice."""
    words, generator = WORDS.split(), np.random.default_rng(seed)

    def some(most: int) -> str:
        return " ".join(generator.choice(words, generator.integers(1, most)))

    out = []
    for number in range(count):
        n = int(generator.integers(2, 5))
        if number % 3:
            out.append(Question((some(12),), tuple(" " + some(7) for _ in range(n)), int(generator.integers(n))))
        else:
            out.append(Question(tuple(some(12) for _ in range(n)), (" " + some(7),) * n, int(generator.integers(n))))
    return out


def one_by_one(model, tokenizer, question: Question) -> bool:
    """The choice with the largest log-likelihood per byte, each choice in a sequence of its own."""
    values = []
    for i, text in enumerate(question.continuations):
        context = tokenizer(question.contexts[min(i, len(question.contexts) - 1)])["input_ids"]
        ids = torch.tensor([context + tokenizer(text)["input_ids"]])
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(
                model(ids).logits[0, len(context) - 1 : -1], ids[0, len(context) :], reduction="sum"
            )
        values.append(-float(loss) / len(text.encode()))
    return int(np.argmax(values)) == question.gold


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("tokens_per_pass", [1, 300])
def test_shared_passes_give_the_answers_of_separate_ones(family: str, tokens_per_pass: int, tmp_path: Path) -> None:
    stock = save_stock(tmp_path / "stock", family)
    model = AutoModelForCausalLM.from_pretrained(stock, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(stock)
    asked = questions(1)
    other = tiny_model(family, seed=5)
    runs = [Run("own", None), Run("same", nullcontext), Run("other", nullcontext, other)]
    told: list[tuple[int, int]] = []
    found = answer(model, tokenizer, asked, runs, tokens_per_pass, lambda done, total: told.append((done, total)))
    assert found["own"].tolist() == [one_by_one(model, tokenizer, question) for question in asked]
    assert found["own"].tolist() == found["same"].tolist()
    assert found["other"].tolist() == [one_by_one(other, tokenizer, question) for question in asked]
    assert found["own"].tolist() != found["other"].tolist()
    assert told[-1][0] == told[-1][1] == len(told)
    # without the mask the choices would see each other, and the answers would not be these
    assert not all(found["own"])
    assert any(found["own"])


def test_the_choices_of_a_question_do_not_run_its_context_again(tmp_path: Path) -> None:
    stock = save_stock(tmp_path / "stock")
    tokenizer = AutoTokenizer.from_pretrained(stock)
    asked = [Question((WORDS.strip(),), (" the sea", " the ship", " the captain"), 0)]
    rows = choices._rows(0, asked[0], tokenizer)
    parts = [WORDS.strip(), *asked[0].continuations]
    assert [row.size for row in rows] == [sum(len(tokenizer(text)["input_ids"]) for text in parts)]


def test_longer_choices_are_not_punished(tmp_path: Path) -> None:
    """A model that finds every token equally likely ranks by bytes per token, not by the number of tokens."""
    stock = save_stock(tmp_path / "stock")
    model = AutoModelForCausalLM.from_pretrained(stock, dtype=torch.float32).eval()
    model.get_output_embeddings().weight.data.zero_()
    tokenizer = AutoTokenizer.from_pretrained(stock)
    short, long = " x", " captain"  # bytes that are no word of the tokenizer, and a word
    per_byte = {text: len(tokenizer(text)["input_ids"]) / len(text) for text in (short, long)}
    gold = int(per_byte[long] < per_byte[short])
    asked = [Question(("the sea",), (short, long), gold)]
    assert answer(model, tokenizer, asked, [Run("flat", None)])["flat"].tolist() == [True]


def test_both_forms_of_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    lines = [
        {"query": "Question: which?\n", "choices": ["a b", " c"], "gold": 1},
        {"query": "The end is", "choices": ["near", "far"], "gold": 0},
        {"context_options": ["Sarah", "Maria"], "continuation": "slept.", "gold": 1},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert load_questions(path) == [
        Question(("Question: which?\nAnswer:",), (" a b", " c"), 1),
        Question(("The end is",), (" near", " far"), 0),
        Question(("Sarah", "Maria"), (" slept.", " slept."), 1),
    ]
    assert len(load_questions(path, 2)) == 2


@pytest.mark.parametrize(
    ("text", "limit", "message"),
    [
        ("", None, "the file is empty"),
        ("{", None, "line 1: needed are query, choices and gold"),
        ('{"context": "a", "continuation": "b"}', None, "needed are query"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', None, "gold must be from 0 to 1"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', 0, "at least 1, got 0"),
    ],
)
def test_bad_files_are_refused(text: str, limit: int | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text(text)
    with pytest.raises(PrismError, match=message):
        load_questions(tmp_path / "set.jsonl", limit)


def test_the_shared_sets_can_be_read(shared_data: Path) -> None:
    for name, ways in {"arc_easy": 4, "piqa": 2, "openbook_qa": 4, "boolq": 2, "winogrande": 2}.items():
        found = load_questions(shared_data / "mcq" / f"{name}.jsonl", 20)
        assert len(found) == 20
        assert all(len(question.continuations) == ways for question in found)
        assert len({question.gold for question in found}) > 1

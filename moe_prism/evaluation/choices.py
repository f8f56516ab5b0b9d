"""Multiple-choice questions, answered by the length-normalised log-likelihood of each choice.

All choices of a question share one forward pass over their common context. Knows a setting only as a context manager,
as ``measure`` does, and nothing of budgets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import PrismError
from .measure import Progress, Run


class Question(NamedTuple):
    """One question.

    Attributes:
        contexts: what comes before the choices: one text for all of them, or one for each (as in WinoGrande, where
            the choice is inside the context and the continuation is what is scored).
        continuations: one text for each choice, each beginning with a space.
        gold: position of the right choice.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


class _Row(NamedTuple):
    """A sequence of one context and some continuations that see the context and themselves only.

    Attributes:
        question, first: whose choices these are, and the position of the first.
        context: its token ids.
        continuations: token ids of each.
        lengths: UTF-8 bytes of each.
    """

    question: int
    first: int
    context: list[int]
    continuations: list[list[int]]
    lengths: list[int]

    @property
    def size(self) -> int:
        return len(self.context) + sum(map(len, self.continuations))


def load_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """The first ``limit`` questions of a JSONL file.

    Lines are ``{query, choices, gold}`` or ``{context_options, continuation, gold}``. A query that begins with
    "Question:" or "Passage:" is followed by a line "Answer:".

    Raises:
        PrismError: no such file, a line of another form (its number is named), or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise PrismError(f"the number of questions must be at least 1, got {limit}")
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()[:limit]
    except (OSError, UnicodeDecodeError) as error:
        raise PrismError(f"questions {path} cannot be read: {error}") from None
    if not lines:
        raise PrismError(f"questions {path}: the file is empty")
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _parse(line: str, where: str) -> Question:
    try:
        raw = json.loads(line)
        gold = raw["gold"]
        if "context_options" in raw:
            contexts = tuple(str(text).strip() for text in raw["context_options"])
            continuations = (" " + str(raw["continuation"]).strip(),) * len(contexts)
        else:
            query = str(raw["query"]).strip()
            contexts = (query + "\nAnswer:" if query.startswith(("Question:", "Passage:")) else query,)
            continuations = tuple(" " + str(text).strip() for text in raw["choices"])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise PrismError(
            f"{where}: needed are query, choices and gold, or context_options, continuation and gold; {error!r}"
        ) from None
    if not isinstance(gold, int) or not 0 <= gold < len(continuations) or not all(contexts):
        raise PrismError(f"{where}: gold must be from 0 to {len(continuations) - 1} and no context empty, got {gold!r}")
    return Question(contexts, continuations, gold)


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[Question],
    runs: Sequence[Run],
    tokens_per_pass: int = 2048,
    progress: Progress | None = None,
) -> dict[str, np.ndarray]:
    """Which questions every run gets right: the choice with the largest log-likelihood per UTF-8 byte is its answer.

    A context is run once for all of its choices: they follow it in one sequence, each at the positions right after
    the context and blind to the others, which gives the log-likelihoods of separate sequences.

    Args:
        model: what runs without a model of their own use; its attention must take a mask of its own for every pair
            of tokens (transformers' eager and sdpa do).
        tokenizer: of the model.
        questions: from ``load_questions``.
        runs: settings with unique names; ``apply=None`` is the model as it is.
        tokens_per_pass: sequences are padded to the longest and batched up to so many tokens.
        progress: called with (forward passes done, in all).

    Returns:
        For every run bool ``[questions]``.

    Raises:
        PrismError: log-likelihoods that are not finite; the run is named.
    """
    rows = sorted((row for i, q in enumerate(questions) for row in _rows(i, q, tokenizer)), key=lambda row: row.size)
    batches = _batches(rows, tokens_per_pass)
    scores = {run.name: [np.full(len(q.continuations), np.nan) for q in questions] for run in runs}
    done = 0
    for batch in batches:
        ids, positions, visible = _tree(batch)
        for run in runs:
            used = model if run.model is None else run.model
            mask = torch.zeros(visible.shape, dtype=used.dtype).masked_fill(~visible, torch.finfo(used.dtype).min)
            inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask[:, None]}
            inputs = {name: value.to(used.device) for name, value in inputs.items()}
            if run.apply is None:
                logits = used(**inputs, use_cache=False).logits
            else:
                with run.apply():
                    logits = used(**inputs, use_cache=False).logits
            for row, row_logits in zip(batch, logits, strict=True):
                values = _log_likelihoods(row, row_logits) / np.array(row.lengths)
                if not np.isfinite(values).all():
                    raise PrismError(f"{run.name} gives log-likelihoods that are not finite; try float32")
                scores[run.name][row.question][row.first : row.first + len(values)] = values
            done += 1
            if progress is not None:
                progress(done, len(batches) * len(runs))
    gold = np.array([question.gold for question in questions])
    return {name: np.array([value.argmax() for value in values]) == gold for name, values in scores.items()}


def _rows(number: int, question: Question, tokenizer: Any) -> list[_Row]:
    """The sequences of a question: one if its choices share a context, else one for each."""

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    continuations = [ids(text) for text in question.continuations]
    lengths = [len(text.encode()) for text in question.continuations]
    if len(question.contexts) == 1:
        return [_Row(number, 0, ids(question.contexts[0]), continuations, lengths)]
    return [
        _Row(number, i, ids(context), continuations[i : i + 1], lengths[i : i + 1])
        for i, context in enumerate(question.contexts)
    ]


def _batches(rows: list[_Row], tokens: int) -> list[list[_Row]]:
    """Neighbours of rising size together, at most ``tokens`` after padding (one row at least)."""
    out: list[list[_Row]] = []
    for row in rows:
        if out and row.size * (len(out[-1]) + 1) <= tokens:
            out[-1].append(row)
        else:
            out.append([row])
    return out


def _tree(batch: list[_Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and positions, int64 ``[B, S]``, and who sees whom, bool ``[B, S, S]``, padded at the end."""
    size = max(row.size for row in batch)
    ids = torch.zeros(len(batch), size, dtype=torch.long)
    positions = torch.zeros(len(batch), size, dtype=torch.long)
    visible = torch.eye(size, dtype=torch.bool).repeat(len(batch), 1, 1)  # padding sees itself: no empty softmax
    for b, row in enumerate(batch):
        shared = len(row.context)
        ids[b, :shared] = torch.tensor(row.context)
        positions[b, :shared] = torch.arange(shared)
        visible[b, :shared, :shared] = torch.ones(shared, shared, dtype=torch.bool).tril()
        start = shared
        for continuation in row.continuations:
            stop = start + len(continuation)
            ids[b, start:stop] = torch.tensor(continuation)
            positions[b, start:stop] = torch.arange(shared, shared + stop - start)
            visible[b, start:stop, :shared] = True
            visible[b, start:stop, start:stop] = torch.ones(stop - start, stop - start, dtype=torch.bool).tril()
            start = stop
    return ids, positions, visible


def _log_likelihoods(row: _Row, logits: Tensor) -> np.ndarray:
    """Summed log-probability of each continuation: fp64 ``[choices]``, from logits ``[S, V]``."""
    out = []
    start = len(row.context)
    for continuation in row.continuations:
        stop = start + len(continuation)
        # the first token is predicted by the end of the context, wherever the continuation stands
        before = torch.tensor([len(row.context) - 1, *range(start, stop - 1)])
        log_probs = logits[before].float().log_softmax(-1)
        target = torch.tensor(continuation, device=log_probs.device)
        out.append(float(log_probs.gather(-1, target[:, None]).double().sum()))
        start = stop
    return np.array(out)

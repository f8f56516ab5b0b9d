"""What a budget costs where it is spent: in the prompt, or in what follows it.

The first half of every window is a prompt, run at one budget; the second half is the continuation, run at another and
the only part whose loss counts. A prompt's budget reaches it through keys and values alone. Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..checkpoint.schema import PhasePoint, Phases
from ..elastic import dial_of
from ..errors import PrismError
from .measure import Run, measure
from .points import paired_difference

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure_phases(
    model: PreTrainedModel,
    windows: torch.Tensor,
    budgets: Sequence[int],
    text: str,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Phases:
    """Excess loss of continuations for every pair of budgets.

    One forward pass over a whole window gives what prefill and decode in turn give (tested): every token attends to
    keys and values that were computed at its predecessors' budgets.

    Args:
        model: elastic; its budget is put back.
        windows: int64 ``[n, context + 1]``; of more than a batch, what does not fill one is left out.
        budgets: in 1..full, at least two; full budget is added, where both phases are the original model.
        text: name of the text, for the record.
        batch_size: windows of a forward pass.
        progress: called with (forward passes done, in all).

    Raises:
        PrismError: budgets out of range, repeated or fewer than two, or windows without two halves.
    """
    dial = dial_of(model)
    grid = sorted({*(dial.check(k) for k in budgets), dial.full_budget})
    if len(set(budgets)) != len(budgets) or len(budgets) < 2:
        raise PrismError(f"phases need two or more different budgets, got {list(budgets)}")
    context = windows.shape[1] - 1
    prompt = context // 2
    if prompt < 1:
        raise PrismError(f"a window of {context} tokens has no prompt and continuation; use a larger context")
    batch_size = min(batch_size, len(windows))
    windows = windows[: len(windows) // batch_size * batch_size]
    runs = {
        (prefill, decode): Run(
            f"{prefill} then {decode}",
            partial(_filled, model, [prefill] * prompt + [decode] * (context - prompt), batch_size),
        )
        for prefill in grid
        for decode in grid
        if min(prefill, decode) < dial.full_budget
    }
    results = measure(model, windows, [Run("full", None), *runs.values()], batch_size, progress)
    # The token at position p predicts that at p + 1: the last one of the prompt gives the first of the continuation.
    losses = {name: result.nll.reshape(len(windows), context)[:, prompt:].ravel() for name, result in results.items()}
    points = []
    for (prefill, decode), run in runs.items():
        excess, error = paired_difference(losses[run.name], losses["full"])
        points.append(PhasePoint(prefill=prefill, decode=decode, excess=excess, stderr=error))
    points.append(PhasePoint(prefill=dial.full_budget, decode=dial.full_budget, excess=0.0, stderr=0.0))
    return Phases(text=text, prompt_tokens=prompt, tokens=len(losses["full"]), points=points)


@contextmanager
def _filled(model: PreTrainedModel, budgets: list[int], rows: int) -> Iterator[None]:
    dial = dial_of(model)
    requests = torch.arange(rows)
    if dial.sharing is not None:
        dial.sharing.open(requests)
    dial.fill(budgets * rows, requests.repeat_interleave(len(budgets)))
    try:
        yield
    finally:
        dial.fill(None)

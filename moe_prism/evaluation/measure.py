"""Runs one text through a model at many settings and keeps what operating points are made of.

Knows a setting only as a context manager; nothing of budgets, files or statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from moe_prism.errors import PrismError

from .kept import Kept, Sums
from .points import RunResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]
"""Called with (forward passes done, forward passes in all)."""


@dataclass(frozen=True)
class Run:
    """One setting to measure.

    Attributes:
        name: Key of the result.
        apply: Makes the context manager under which the model runs; ``None`` where the setting is the full model
            itself, whose outputs are then reused instead of computed again.
        model: The model to run where it is another one than the full model's, e.g. the same weights with another
            gate. It must take the same token ids.
    """

    name: str
    apply: Callable[[], AbstractContextManager[object]] | None
    model: PreTrainedModel | None = None


@dataclass
class _Totals:
    """What accumulates over batches for one run."""

    nll: list[torch.Tensor] = field(default_factory=list)
    kl: float = 0.0
    agreed: int = 0

    def add(self, log_probs: torch.Tensor, full: torch.Tensor, targets: torch.Tensor) -> None:
        """One sequence: log-probabilities fp32 [T, V] of the run and of the full model, targets int64 [T]."""
        self.nll.append(-log_probs.gather(-1, targets[:, None])[:, 0].cpu())
        if log_probs is full:
            self.agreed += len(targets)
            return
        self.kl += float((full.exp() * (full - log_probs)).sum(-1).double().sum())
        self.agreed += int((log_probs.argmax(-1) == full.argmax(-1)).sum())

    def sums(self) -> Sums:
        return Sums(torch.cat(self.nll), self.kl, self.agreed)

    def result(self) -> RunResult:
        nll = torch.cat(self.nll).numpy().astype(np.float32)
        return RunResult(nll=nll, kl=self.kl / len(nll), top1_agreement=self.agreed / len(nll))


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    windows: torch.Tensor,
    runs: Sequence[Run],
    batch_size: int = 8,
    progress: Progress | None = None,
    kept: Kept | None = None,
) -> dict[str, RunResult]:
    """Token loss, KL to the full model and top-1 agreement of every run on the same tokens.

    Per batch the model runs once as it is ("the full model", shared by all comparisons), then once per run.
    Log-probabilities are fp32 whatever the model's dtype; of them one batch of the full model
    ``batch_size * T * V * 4`` bytes and a single sequence of the run are held at a time.

    Args:
        model: A causal language model in the state that counts as full; it is put into eval mode.
        windows: int64 [n, T + 1] as made by :func:`moe_prism.evaluation.text.windows`.
        runs: Settings with unique names.
        batch_size: Windows per forward pass, at least 1.
        progress: Told after every forward pass.
        kept: Where batches are kept, and found again after an interruption.

    Returns:
        For every run its result over n * T tokens, in reading order.

    Raises:
        PrismError: repeated names, no runs, batch size below 1, token ids outside the vocabulary, or logits that
            are not finite (the run is named).
    """
    _check(model, windows, runs, batch_size)
    totals = {run.name: _Totals() for run in runs}
    used: list[torch.nn.Module] = [model, *(run.model for run in runs if run.model is not None)]
    for each in used:
        each.eval()
    batches = torch.split(windows, batch_size)
    each_batch = 1 + sum(run.apply is not None for run in runs)
    file = None if kept is None else kept.file(windows, list(totals), batch_size)
    known = 0
    if file is not None:
        known, sums = Kept.read(file)
        totals |= {name: _Totals([each.nll], each.kl, each.agreed) for name, each in sums.items()}
    done, passes = known * each_batch, len(batches) * each_batch

    def finished_one() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, passes)

    for number, batch in enumerate(batches[known:], known + 1):
        ids, targets = batch[:, :-1], batch[:, 1:].to(model.device)
        full = [row.float().log_softmax(-1) for row in _logits(model, ids, "the full model")]
        finished_one()
        for run in runs:
            if run.apply is None:
                for row, target in zip(full, targets, strict=True):
                    totals[run.name].add(row, row, target)
                continue
            with run.apply():
                logits = _logits(run.model if run.model is not None else model, ids, run.name)
            for row, full_row, target in zip(logits, full, targets, strict=True):
                totals[run.name].add(row.to(full_row.device).float().log_softmax(-1), full_row, target)
            finished_one()
        if file is not None:
            Kept.write(file, number, {name: total.sums() for name, total in totals.items()})
    return {name: total.result() for name, total in totals.items()}


@torch.inference_mode()
def max_logit_difference(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    windows: torch.Tensor,
    batch_size: int = 8,
    apply: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> float:
    """max |logit difference| of two models over all positions of the windows, in logit units (fp32).

    Args:
        model: Run under ``apply()``.
        reference: Usually the original model, in the same dtype.
        windows: int64 [n, T + 1]; the last token of each is not run.
        batch_size: Windows per forward pass.
        apply: Context of the first model.

    Raises:
        PrismError: as :func:`measure`.
    """
    _check(model, windows, [Run("model", None)], batch_size)
    worst = 0.0
    for batch in torch.split(windows, batch_size):
        with apply():
            ours = _logits(model, batch[:, :-1], "the model")
        theirs = _logits(reference, batch[:, :-1], "the reference").to(ours.device)
        worst = max(worst, *(float((a.float() - b.float()).abs().max()) for a, b in zip(ours, theirs, strict=True)))
    return worst


def _logits(model: PreTrainedModel, ids: torch.Tensor, name: str) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    if not all(bool(row.isfinite().all()) for row in logits):
        raise PrismError(
            f"{name} gives logits that are not finite; the weights hold NaN or inf, or {logits.dtype} is too narrow: "
            "try float32"
        )
    return logits


def _check(model: PreTrainedModel, windows: torch.Tensor, runs: Sequence[Run], batch_size: int) -> None:
    names = [run.name for run in runs]
    if not names:
        raise PrismError("nothing to measure: give at least one run")
    if len(set(names)) != len(names):
        raise PrismError(f"runs need different names, got {names}")
    if batch_size < 1:
        raise PrismError(f"batch size must be at least 1, got {batch_size}")
    vocabulary = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
    if int(windows.min()) < 0 or int(windows.max()) >= vocabulary:
        raise PrismError(
            f"token ids {int(windows.min())}..{int(windows.max())} do not fit the model's vocabulary of {vocabulary}: "
            "use the tokenizer that belongs to the model"
        )

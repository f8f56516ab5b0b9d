"""Losses, KL and agreement against transformers' own loss and torch's own divergence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from tiny import tiny_model, tokens
from transformers import PreTrainedModel

from moe_prism.errors import PrismError
from moe_prism.evaluation.measure import Run, max_logit_difference, measure

WINDOWS = tokens(batch=5, length=13)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("olmoe")


@contextmanager
def scaled(model: PreTrainedModel, factor: float) -> Iterator[None]:
    """A setting that changes the outputs: the head times a factor."""
    weight = model.get_output_embeddings().weight
    before = weight.data.clone()
    weight.data.mul_(factor)
    try:
        yield
    finally:
        weight.data.copy_(before)


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_loss_is_that_of_transformers(model: PreTrainedModel) -> None:
    result = measure(model, WINDOWS, [Run("full", None)], batch_size=2)["full"]
    with torch.no_grad():
        loss = model(input_ids=WINDOWS, labels=WINDOWS).loss  # transformers shifts the labels itself
    assert result.nll.dtype == np.float32
    assert result.nll.shape == (5 * 12,)
    assert result.mean_nll == pytest.approx(float(loss), rel=1e-5)
    assert result.kl == 0
    assert result.top1_agreement == 1


def test_kl_and_agreement(model: PreTrainedModel) -> None:
    result = measure(model, WINDOWS, [Run("hot", lambda: scaled(model, -0.3))], batch_size=3)["hot"]
    full = logits_of(model, WINDOWS[:, :-1])
    with scaled(model, -0.3):
        run = logits_of(model, WINDOWS[:, :-1])
    # KL(full || run) is torch's kl_div(input=run, target=full)
    kl = torch.nn.functional.kl_div(run.log_softmax(-1), full.log_softmax(-1), reduction="none", log_target=True)
    nll = torch.nn.functional.cross_entropy(run.flatten(0, 1), WINDOWS[:, 1:].flatten(), reduction="none")
    agreement = (run.argmax(-1) == full.argmax(-1)).float().mean()
    assert result.kl == pytest.approx(float(kl.sum(-1).mean()), rel=1e-4)
    assert result.kl > 0.1
    np.testing.assert_allclose(result.nll, nll.numpy(), rtol=1e-4, atol=1e-5)
    assert result.top1_agreement == pytest.approx(float(agreement))


def test_batch_size_does_not_matter(model: PreTrainedModel) -> None:
    runs = [Run("hot", lambda: scaled(model, 0.5))]
    one, many = (measure(model, WINDOWS, runs, batch_size=b)["hot"] for b in (1, 4))
    np.testing.assert_allclose(one.nll, many.nll, rtol=1e-4, atol=1e-5)
    assert one.kl == pytest.approx(many.kl, rel=1e-4)


def test_the_full_model_runs_once_for_all_and_progress_counts_every_pass(model: PreTrainedModel) -> None:
    calls, told = [], []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    runs = [Run("a", None), Run("b", nullcontext), Run("c", nullcontext), Run("d", None)]
    results = measure(model, WINDOWS, runs, batch_size=2, progress=lambda done, total: told.append((done, total)))
    hook.remove()
    assert len(calls) == 3 * 3  # three batches, and per batch the full model and two runs
    assert told == [(i, 9) for i in range(1, 10)]
    np.testing.assert_array_equal(results["a"].nll, results["d"].nll)
    np.testing.assert_allclose(results["a"].nll, results["b"].nll, rtol=1e-6)


def test_another_model_is_compared_with_the_full_one(model: PreTrainedModel) -> None:
    other = tiny_model("olmoe", seed=1)
    result = measure(model, WINDOWS, [Run("other", nullcontext, other)])["other"]
    alone = measure(other, WINDOWS, [Run("other", None)])["other"]
    np.testing.assert_allclose(result.nll, alone.nll, rtol=1e-4, atol=1e-5)
    assert result.kl > 0.1


def test_low_precision_models_are_judged_in_fp32() -> None:
    model = tiny_model("olmoe").to(torch.bfloat16)
    result = measure(model, WINDOWS, [Run("full", None)])["full"]
    # bf16 has 8 bits: losses computed in it would fall on a coarse grid
    assert (result.nll != torch.from_numpy(result.nll).bfloat16().float().numpy()).mean() > 0.9


def test_dropout_is_off(model: PreTrainedModel) -> None:
    model.train()
    measure(model, WINDOWS, [Run("full", None)])
    assert not model.training


def test_logits_that_are_not_finite_name_the_run(model: PreTrainedModel) -> None:
    with pytest.raises(PrismError, match=r"^broken gives logits that are not finite"):
        measure(model, WINDOWS, [Run("broken", lambda: scaled(model, float("nan")))])


@pytest.mark.parametrize(
    ("windows", "runs", "batch_size", "message"),
    [
        (WINDOWS, [], 8, "at least one run"),
        (WINDOWS, [Run("a", None), Run("a", None)], 8, "different names"),
        (WINDOWS, [Run("a", None)], 0, "batch size must be at least 1, got 0"),
        (WINDOWS + 90, [Run("a", None)], 8, "vocabulary of 96"),
    ],
)
def test_bad_input(
    model: PreTrainedModel, windows: torch.Tensor, runs: list[Run], batch_size: int, message: str
) -> None:
    with pytest.raises(PrismError, match=message):
        measure(model, windows, runs, batch_size=batch_size)


def test_largest_logit_difference(model: PreTrainedModel) -> None:
    other = tiny_model("olmoe", seed=1)
    expected = (logits_of(model, WINDOWS[:, :-1]) - logits_of(other, WINDOWS[:, :-1])).abs().max()
    assert max_logit_difference(model, other, WINDOWS, batch_size=2) == pytest.approx(float(expected), rel=1e-4)
    assert max_logit_difference(model, model, WINDOWS) == 0
    doubled = max_logit_difference(model, model, WINDOWS, apply=lambda: scaled(model, 2.0))
    assert doubled == pytest.approx(float(logits_of(model, WINDOWS[:, :-1]).abs().max()), rel=1e-4)

"""Train what lies beside the model, so that budgets lose less; the model itself stays bit for bit what it was.

Two objectives (``finetune_recipe``): cross-entropy on the text with a curriculum on the budget, as in arXiv 2510.19366,
phase 1.3, or the KL of the full model to the model at the budget. Batches and budgets follow from the seed and the
number of the step alone, and parameters and Adam's moments are kept every few steps, so a killed run goes on and ends
where an uninterrupted one does, up to rounding. Knows nothing of how gates score.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from ..elastic import budget, dial_of
from ..errors import PrismError
from ..experts import ExpertLayer
from ..gates import ExpertProfile, Gate
from .calibration import load_calibration
from .finetune_experts import IMPLEMENTATION
from .finetune_recipe import Finetune
from .finetune_tensors import Trainable
from .recipe import Recipe
from .workspace import Workspace

# Steps between two states that are kept: losing them costs seconds.
KEEP_EVERY = 10
_KEPT, _WINDOWS = "finetune", "finetune-windows"
_BETAS = (0.9, 0.99)
_SMALLEST_KL = 1e-6
Tell = Callable[[str, int, int], None]


def check_finetune(recipe: Recipe, layers: list[ExpertLayer], gate: Gate, skip: bool) -> None:
    """Raises PrismError where the recipe asks for finetuning and nothing lies beside the model to be trained."""
    if recipe.finetune is None:
        return
    if recipe.shadow_bits or recipe.recalibration != "mean":
        raise PrismError(
            "finetune trains whole precision and recalibration: mean; set shadow_bits: 0 and recalibration: mean, got "
            f"shadow_bits: {recipe.shadow_bits}, recalibration: {recipe.recalibration}"
        )
    if skip or recipe.compensation_budgets:
        return
    neurons, hidden = layers[0].num_neurons, layers[0].hidden_size
    blank = ExpertProfile(torch.zeros(1, neurons), torch.zeros(1), torch.zeros(neurons), torch.zeros(hidden))
    if not gate.fit(blank, recipe.num_sub_experts):
        raise PrismError(
            f"finetune: gate {recipe.gate!r} has no tensors to train; use gate linear or static, or set "
            "compensation_budgets to 1 or more"
        )


def training_windows(
    text: str | None, tokenizer: Any, model: PreTrainedModel, recipe: Recipe, work: Workspace, tell: Tell
) -> Tensor:
    """Windows int64 ``[n, context]`` from the source of the calibration text, settled once in the workspace."""
    assert recipe.finetune is not None  # the caller asked
    kept = work.tensors(_WINDOWS)
    if kept is None:
        tokens = recipe.finetune.steps * recipe.finetune.batch * recipe.context
        report = partial(tell, "sample")
        found = load_calibration(text, tokenizer, model, tokens, recipe.context, recipe.seed, report).windows
        kept = {"windows": found}
        work.keep_tensors(_WINDOWS, kept)
    return kept["windows"]


def finetune(
    model: PreTrainedModel,
    windows: Tensor,
    how: Finetune,
    seed: int,
    work: Workspace,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Tensor]:
    """Train on windows of text.

    Args:
        model: elastic; on return its layers use the trained tensors.
        windows: int64 ``[n, context]``.
        how: objective, steps and so on.
        seed: of the order of windows and of the budgets.
        work: where states are kept.
        progress: called with (steps done, in all).

    Returns:
        What was trained, by the names of a checkpoint, fp32.

    Raises:
        PrismError: the loss or its gradient is not finite; the layers then use what they used before.
    """
    trained = Trainable(model)
    changes = trained.changes
    adam = torch.optim.Adam(changes.values(), betas=_BETAS)
    done = _resume(work, changes, adam)
    implementation: str = model.config._experts_implementation
    frozen = [each for each in model.parameters() if each.requires_grad]
    for each in frozen:
        each.requires_grad_(False)
    model.set_experts_implementation(IMPLEMENTATION)
    try:
        for step in range(done, how.steps):
            batch, budgets = _batch(windows, dial_of(model).full_budget, how, seed, step)
            for group in adam.param_groups:
                group["lr"] = how.learning_rate * _schedule(step, how.steps)
            with torch.enable_grad():
                trained.put()
                loss = _loss(model, batch.to(model.device), budgets, how)
            adam.zero_grad(set_to_none=False)
            loss.backward()
            if not (math.isfinite(loss.item()) and all(_finite(change.grad) for change in changes.values())):
                raise PrismError(
                    f"finetuning: the loss of step {step + 1} is {loss.item()}, or its gradient is not finite; lower "
                    f"finetune.learning_rate (it is {how.learning_rate}), or compute in float32 (--dtype float32)"
                )
            adam.step()
            if (step + 1) % KEEP_EVERY == 0 or step + 1 == how.steps:
                _keep(work, changes, adam, step + 1)
            if progress:
                progress(step + 1, how.steps)
    except BaseException:
        trained.restore()
        raise
    finally:
        model.set_experts_implementation(implementation)
        for each in frozen:
            each.requires_grad_(True)
    with torch.no_grad():
        trained.put()
    return trained.values()


def _loss(model: PreTrainedModel, ids: Tensor, budgets: list[int], how: Finetune) -> Tensor:
    """Cross-entropy in nats a token, or the mean over the windows of the logarithm of their KL."""
    if how.objective == "cross-entropy":
        with budget(model, budgets):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
    with torch.no_grad(), budget(model, dial_of(model).full_budget):
        target = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    with budget(model, budgets):
        ours = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    each: Tensor = (target.exp() * (target - ours)).sum(-1).mean(1)
    # Logarithms: low budgets lose a hundred times as much as high ones, and would be all that counts.
    return each.clamp(min=_SMALLEST_KL).log().mean()


def _finite(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.isfinite().all())


def _batch(windows: Tensor, full: int, how: Finetune, seed: int, step: int) -> tuple[Tensor, list[int]]:
    """Windows ``[batch, context]`` of a step and the budget of each."""
    place = torch.arange(step * how.batch, (step + 1) * how.batch)
    epochs = [_order(len(windows), seed, int(epoch)) for epoch in torch.unique(place // len(windows))]
    first = int(place[0]) // len(windows) * len(windows)
    batch = windows[torch.cat(epochs)[place - first]]
    low, high = how.shares
    if how.curriculum == "rising":
        shares = torch.full((how.batch,), low + (high - low) * step / max(1, how.steps - 1))
    else:  # one from each of as many equal parts of the range
        drawn = torch.rand(how.batch, generator=torch.Generator().manual_seed(seed * how.steps + step))
        shares = low + (high - low) * (torch.arange(how.batch) + drawn) / how.batch
    return batch, (shares * full).round().long().clamp(1, full - 1).tolist()


def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed((seed << 16) + epoch))


def _schedule(step: int, steps: int) -> float:
    """Part of the learning rate: linear warm-up over a twentieth, then the root of what is left."""
    return min(1.0, (step + 1) / max(1, steps // 20)) * math.sqrt(1 - step / steps)


def _keep(work: Workspace, changes: dict[str, Tensor], adam: torch.optim.Adam, step: int) -> None:
    tensors = {"step": torch.tensor(step)}
    for name, change in changes.items():
        tensors[name] = change.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{name}.{moment}"] = adam.state[change][moment]
    work.keep_tensors(_KEPT, tensors)


def _resume(work: Workspace, changes: dict[str, Tensor], adam: torch.optim.Adam) -> int:
    """Steps done; parameters and moments are set to those of the last kept step."""
    kept = work.tensors(_KEPT)
    if kept is None:
        return 0
    for name, change in changes.items():
        change.data.copy_(kept[name])
        moments = {moment: kept[f"{name}.{moment}"] for moment in ("exp_avg", "exp_avg_sq")}
        adam.state[change] = {"step": kept["step"].float(), **moments}
    return int(kept["step"])

"""Set the budgets of an elastic model, or run the original with fewer experts.

Knows nothing of how budgets become a selection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.schema import CONFIG_KEY
from ..errors import PrismError, UnsupportedModelError
from ..experts import ExpertLayer, find_expert_layers
from .dial import Budget, Dial
from .layer import ElasticLayer, require_state, state_of

HOOKS = "_moe_prism_hooks"


def elastic_layers(model: nn.Module) -> list[tuple[ExpertLayer, ElasticLayer]]:
    """Every expert layer with its elastic state; raises PrismError if the model is not elastic."""
    found = find_expert_layers(model)
    config = getattr(model, "config", None)
    pairs = []
    for layer in found:
        state = state_of(layer.module)
        if state is None and getattr(config, CONFIG_KEY, None) is not None:
            from .model import attach_on_demand

            state = attach_on_demand(layer.module)
        pairs.append((layer, state or require_state(layer.module, layer.name)))
    return pairs


def dial_of(model: nn.Module) -> Dial:
    """The dial that all layers of an elastic model share; engines fill it before every step."""
    return elastic_layers(model)[0][1].dial


def full_budget(model: nn.Module) -> int:
    """k * N of an elastic model; raises PrismError for any other."""
    return dial_of(model).full_budget


def set_budget(
    model: nn.Module,
    k_active: Budget | Sequence[Budget] | Tensor,
    *,
    k_min: Budget | None = None,
    cap: int | None = None,
) -> None:
    """From now on every token may run ``k_active`` sub-experts in a layer.

    Args:
        model: an elastic model.
        k_active: a whole number 1..full budget; a share in (0, 1] as a float; the name of an operating
            point ("full", "high", "medium", "low"); or one of these for every row of the batches to come.
        k_min: look at the whole batch: a token is sure of its own best ``k_min``, and has up to ``k_active``
            only of those sub-experts that the step loads for some token anyway.
        cap: different sub-experts that a layer may load in a step (needs ``k_min``; CPU). The set is then
            chosen for the batch; floors come before the cap.

    Where the checkpoint lets tokens of a request share its budget (``token_budgets`` of the recipe), budgets are means
    and need not be whole: 4.5 is one, 0.3 a share that is not rounded. With ``k_min`` tokens do not share.

    Raises:
        PrismError: out of range, or the model is not elastic. Nothing is changed then.
    """
    dial = dial_of(model)
    if dial.sharing is not None:
        announce_batches(model, dial)
    if isinstance(k_active, (Sequence, Tensor)) and not isinstance(k_active, str):
        values = k_active.tolist() if isinstance(k_active, Tensor) else k_active
        rows = torch.tensor([dial.resolve(value) for value in values], dtype=torch.float64)
        rows = rows.long() if torch.equal(rows, rows.long().double()) else rows
        if not len(rows):
            raise PrismError("an empty list of budgets; give one for every row of the batch")
        everyone: int | float = dial.full_budget
    else:
        rows, everyone = None, dial.resolve(k_active)
    floor = None if k_min is None else int(dial.resolve(k_min))
    if cap is not None and (floor is None or cap < 1):
        raise PrismError(f"cap must be at least 1 and needs k_min, got cap={cap!r}, k_min={k_min!r}")
    dial.k_active, dial.rows, dial.k_min, dial.cap = everyone, rows, floor, cap


def announce_batches(model: nn.Module, dial: Dial) -> None:
    """From now on a forward of the model tells the dial the shape of its batch, so that rows can share budgets."""
    body = getattr(model, "base_model", model)
    if HOOKS in body.__dict__:
        return

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((v for v in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if v is not None), None)
        if given is not None:
            past = kwargs.get("past_key_values")
            dial.begin(len(given), given.shape[1], past is None or not past.get_seq_length())

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        dial.batch = None

    body.__dict__[HOOKS] = (
        body.register_forward_pre_hook(begin, with_kwargs=True),
        body.register_forward_hook(end, always_call=True),
    )


@contextmanager
def budget(
    model: nn.Module,
    k_active: Budget | Sequence[Budget] | Tensor,
    *,
    k_min: Budget | None = None,
    cap: int | None = None,
) -> Iterator[None]:
    """``set_budget`` for the length of a block."""
    dial = dial_of(model)
    before = dial.k_active, dial.rows, dial.k_min, dial.cap
    set_budget(model, k_active, k_min=k_min, cap=cap)
    try:
        yield
    finally:
        dial.k_active, dial.rows, dial.k_min, dial.cap = before


@contextmanager
def routed_experts(model: nn.Module, k: int) -> Iterator[None]:
    """The original model with ``k`` routed experts a token: the baseline at equal compute.

    The family's own router picks and weighs them, so renormalisation and group limits are as they would
    be in a model configured that way. An elastic model runs at full budget meanwhile.

    Raises:
        PrismError: ``k`` is not in 1..top_k.
        UnsupportedModelError: the family's router works for one top_k only.
    """
    layers = find_expert_layers(model)
    top_k = layers[0].top_k
    if not 1 <= k <= top_k:
        raise PrismError(f"k must be from 1 to {top_k}, the model's own, got {k}")
    if k < top_k and type(layers[0].router).__name__ == "PhimoeTopKRouter":
        raise UnsupportedModelError("phimoe's router always picks two experts, so k = 1 cannot be measured")
    states = [s for layer in layers if (s := state_of(layer.module)) is not None]
    before = [(s.dial.k_active, s.dial.rows) for s in states]
    try:
        for layer in layers:
            setattr(layer.router, "top_k", k)  # noqa: B010
        for state in states:
            state.dial.k_active, state.dial.rows = state.dial.full_budget, None
        yield
    finally:
        for layer in layers:
            setattr(layer.router, "top_k", top_k)  # noqa: B010
        for state, value in zip(states, before, strict=True):
            state.dial.k_active, state.dial.rows = value

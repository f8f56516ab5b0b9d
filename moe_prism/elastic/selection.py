"""Scores and budgets become a selection: which sub-experts every token runs.

Pure tensor work, the same on every device. Knows nothing of gates (it is given scores) or of weights
(executors are given the selection).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Selection(NamedTuple):
    """A ragged list of S (token, sub-expert) pairs, sorted by sub-expert.

    Attributes:
        token: int64 ``[S]``.
        slot: int64 ``[S]``, which of the token's k routed experts it belongs to.
        sub_expert: int64 ``[S]``, ``expert * N + n``.
        weight: ``[S]``, the routing weight of the expert.
    """

    token: Tensor
    slot: Tensor
    sub_expert: Tensor
    weight: Tensor


def pooled_scores(scores: Tensor, weights: Tensor, weighted: bool, valid: Tensor | None = None) -> Tensor:
    """What candidates are compared by: fp32 ``[T, k, N]``; -inf where a slot holds no expert.

    Args:
        scores: ``[T, k, N]``.
        weights: ``[T, k]`` routing weights.
        weighted: multiply scores by routing weights (False: as in the paper).
        valid: bool ``[T, k]``; False where a slot holds no expert of this device.
    """
    pooled = scores.float()
    if weighted:
        pooled = pooled * weights[..., None].float()
    return pooled if valid is None else pooled.masked_fill(~valid[..., None], -torch.inf)


def first_candidates(pooled: Tensor, weights: Tensor) -> Tensor:
    """The candidate that no token goes without, the best of its top expert: int64 ``[T]`` in [0, k * N)."""
    n = pooled.shape[2]
    top = weights.float().argmax(dim=1)
    return top * n + pooled.gather(1, top[:, None, None].expand(-1, 1, n)).argmax(dim=2).squeeze(1)


def best(pooled: Tensor, first: Tensor, budgets: Tensor) -> Tensor:
    """The ``budgets[t]`` best candidates of every token, pooled over its k experts.

    The first candidate is always among them. Equal scores are taken in the order of slots, so a gate that
    cannot tell siblings apart fills one expert before it opens the next.

    Args:
        pooled: ``[T, k, N]``; -inf marks what cannot be chosen.
        first: int64 ``[T]``, from ``first_candidates``.
        budgets: int64 ``[T]``, sub-experts that a token may run; at least 1.

    Returns:
        bool ``[T, k, N]``.
    """
    flat = pooled.flatten(1)
    possible = flat > -torch.inf
    possible |= flat.isnan()
    lifted = flat.scatter(1, first[:, None], torch.inf)
    order = torch.argsort(lifted, dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(flat.shape[1], device=flat.device).expand_as(order))
    return ((rank < budgets[:, None]) & possible).view_as(pooled)


def softmax_weights(values: Tensor, weights: Tensor, full: Tensor) -> Tensor:
    """Weights of the candidates where the gate gives them, fp32 ``[T, k, N]``.

    A gate's softmax over the candidates shares out the token's routing weights, N times over since each expert has N
    sub-experts. Rows equal to a softmax router's give every sub-expert its expert's routing weight.

    Args:
        values: ``[T, k, N]``, adding up to one for every token.
        weights: ``[T, k]`` routing weights.
        full: bool ``[T]``, tokens at full budget: they keep their routing weights, whatever the gate says.
    """
    shared = values.float() * (values.shape[2] * weights.float().sum(dim=1))[:, None, None]
    return torch.where(full[:, None, None], weights[..., None].float(), shared)


def gather_selection(chosen: Tensor, index: Tensor, weights: Tensor, pairs: int | None = None) -> Selection:
    """Sort the chosen pairs by sub-expert.

    Args:
        chosen: bool ``[T, k, N]``.
        index: int64 ``[T, k]`` routed experts.
        weights: ``[T, k]``.
        pairs: how many are chosen, where the host knows it: then it need not wait for a device to count.
    """
    k, n = chosen.shape[1:]
    if pairs is None:
        token, slot, part = chosen.nonzero(as_tuple=True)
    else:
        found = torch.argsort(chosen.flatten(), descending=True, stable=True)[:pairs]
        token, slot, part = found // (k * n), found // n % k, found % n
    sub_expert = index[token, slot] * n + part
    order = torch.argsort(sub_expert, stable=True)
    token, slot = token[order], slot[order]
    return Selection(token, slot, sub_expert[order], weights[token, slot])


def whole_experts(index: Tensor, weights: Tensor, valid: Tensor | None) -> Selection:
    """Full budget: every token's routed experts, as a selection with one sub-expert per expert."""
    chosen = torch.ones_like(index, dtype=torch.bool) if valid is None else valid
    return gather_selection(chosen[..., None], index, weights)

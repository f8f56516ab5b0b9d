"""Tokens of a request share its budget: one with concentrated scores takes less, another more, and the mean is kept.

In every layer a request has an account of what its tokens left over. A token wants as many sub-experts as it has scores
above a threshold (of its budget and layer, from calibration), and gets at most its budget and what is in the account.
That is causal, so a request gets the same whether its tokens come one by one or in a chunk, and whoever else is in the
batch; and the mean of its tokens so far never exceeds its budget. What lies in the account is spent over the next
``WINDOW`` tokens, so that it stays below ``WINDOW + 1`` budgets: after t tokens the mean is at least
``budget (1 - (WINDOW + 1) / t)``. The order of tokens matters, hence the host decides. Knows nothing of gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WINDOW = 16


def relative_scores(scores: Tensor, weights: Tensor, weighted: bool) -> Tensor:
    """What thresholds are compared with: fp32 ``[T, k * N]``, free of how much a token routes in all.

    Args:
        scores: ``[T, k, N]``.
        weights: ``[T, k]`` routing weights.
        weighted: multiply scores by them, as selection does.
    """
    if weighted:
        shares = weights.float() / weights.float().sum(dim=1, keepdim=True).clamp(min=1e-20)
        scores = scores.float() * shares[..., None]
    return scores.float().flatten(1)


class Sharing:
    """How far tokens depart from their budgets, and every request's accounts.

    Attributes:
        strength: by budget, ``[full + 1]``: 0 = every token gets its budget, 1 = what it wants, as far as there is;
            between, the part of the way from one to the other.
    """

    def __init__(self, strength: Sequence[float], layers: int) -> None:
        """``strength[K - 1]`` for every budget K."""
        self.strength = np.array([0.0, *strength])
        self._accounts = np.zeros((layers, 0))

    def open(self, requests: Tensor) -> None:
        """Empty the accounts of slots, int64: other requests have taken them."""
        self._fit(requests)
        self._accounts[:, requests.numpy()] = 0.0

    def account(self, layer: int, request: int) -> float:
        """What a request has left over in a layer, in sub-experts."""
        return float(self._accounts[layer, request])

    def share(
        self,
        layer: int,
        budgets: Tensor,
        requests: Tensor,
        scores: Tensor,
        weights: Tensor,
        weighted: bool,
        thresholds: Tensor,
    ) -> Tensor:
        """Sub-experts that every token may run: int64 ``[T]`` on the CPU, from 1 to full budget.

        Args:
            layer: its number.
            budgets: float64 ``[T]`` on the CPU, means; full budget is always given in full.
            requests: int64 ``[T]`` on the CPU, whose token each is; those of a request in their order.
            scores, weights, weighted: as of ``relative_scores``.
            thresholds: fp32 ``[full + 1]`` of the layer on the CPU, falling.
        """
        self._fit(requests)
        chosen = _share(
            budgets.numpy(),
            requests.numpy(),
            _on_host(scores),
            _on_host(weights),
            weighted,
            thresholds.numpy(),
            self.strength,
            self._accounts[layer],
            float(WINDOW),
        )
        return torch.from_numpy(chosen)

    def _fit(self, requests: Tensor) -> None:
        more = int(requests.max()) + 1 - self._accounts.shape[1] if len(requests) else 0
        if more > 0:
            self._accounts = np.pad(self._accounts, ((0, 0), (0, more)))


def _on_host(values: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.detach().float().cpu().contiguous().numpy()
    return array


@numba.njit(cache=True, nogil=True)
def _wanted(scores: Any, weights: Any, weighted: bool, low: Any, high: Any) -> Any:
    """Scores of one token above a threshold: the mean of two counts."""
    total = np.float32(0)
    for s in range(weights.shape[0]):
        total += weights[s]
    above = 0
    for s in range(weights.shape[0]):
        part = weights[s] / max(total, np.float32(1e-20)) if weighted else np.float32(1)
        for i in range(scores.shape[1]):
            value = scores[s, i] * part
            above += (value > low) + (value > high)
    return above / 2


@numba.njit(cache=True, nogil=True)
def _share(
    budgets: Any,
    requests: Any,
    scores: Any,
    weights: Any,
    weighted: bool,
    thresholds: Any,
    strength: Any,
    account: Any,
    window: float,
) -> Any:
    full = strength.shape[0] - 1
    out = np.empty(budgets.shape[0], np.int64)
    for t in range(budgets.shape[0]):
        budget, request = budgets[t], requests[t]
        if budget >= full:
            out[t] = full
            continue
        left, below = account[request], int(budget)
        above = below if budget == below else below + 1
        wanted = _wanted(scores[t], weights[t], weighted, thresholds[below], thresholds[above])
        wants = np.floor(budget + strength[below] * (wanted - budget) + left / window + 0.5)
        gets = max(1.0, min(wants, np.floor(budget + left + 1e-9), full))
        account[request] = max(0.0, left + budget - gets)
        out[t] = int(gets)
    return out

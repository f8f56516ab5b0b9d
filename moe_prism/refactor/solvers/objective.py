"""The quantity that every solver minimises: the activation mass lost by switching sub-experts off.

Knows nothing of how a partition is found.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...errors import PrismError


def check_problem(impact: NDArray[np.float32], num_sub_experts: int, switched_off: int | None) -> NDArray[np.float32]:
    """The impact as float32, if the problem is well posed.

    Args:
        impact: [B, C] non-negative finite importance of neuron c for token b.
        num_sub_experts: N, a divisor of C.
        switched_off: K in 1..N-1, or None for the mean over all of them. N = 1 has no K; only None fits.

    Raises:
        PrismError: anything else; the message names the value and the range.
    """
    if impact.ndim != 2 or 0 in impact.shape:
        raise PrismError(
            f"impact must be a [tokens, neurons] matrix with at least one of each, got shape {impact.shape}; "
            "profile the expert on more calibration tokens"
        )
    if not np.issubdtype(impact.dtype, np.floating):
        raise PrismError(f"impact must be of a floating dtype, got {impact.dtype}; convert it to float32")
    num_neurons = impact.shape[1]
    if num_sub_experts < 1 or num_neurons % num_sub_experts:
        divisors = ", ".join(str(n) for n in range(1, num_neurons + 1) if num_neurons % n == 0)
        raise PrismError(
            f"num_sub_experts must divide the {num_neurons} neurons, got {num_sub_experts}; choose one of {divisors}"
        )
    if num_sub_experts == 1 and switched_off is not None:
        raise PrismError(f"switched_off: one sub-expert leaves nothing to switch off, got {switched_off}; use None")
    if switched_off is not None and not 1 <= switched_off < num_sub_experts:
        raise PrismError(
            f"switched_off must be in 1..{num_sub_experts - 1} for {num_sub_experts} sub-experts, got {switched_off}; "
            "None takes the mean over all of them"
        )
    with np.errstate(over="ignore"):  # becomes infinite, which is refused below
        as_float32 = np.asarray(impact, dtype=np.float32)
    lowest, highest = float(as_float32.min()), float(as_float32.max())
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise PrismError("impact holds NaN or infinite values; check the model's activations before refactoring")
    if lowest < 0:
        raise PrismError(f"impact must be non-negative, its least value is {lowest:g}; take magnitudes first")
    return as_float32


def sub_expert_masses(
    impact: NDArray[np.float32], labels: NDArray[np.int64], num_sub_experts: int
) -> NDArray[np.float64]:
    """``L[b, n]`` [B, N]: L1 impact of sub-expert n for token b (arXiv 2510.19366, phase 1.2)."""
    return np.stack([impact[:, labels == n].sum(axis=1, dtype=np.float64) for n in range(num_sub_experts)], axis=1)


def dropped_mass(
    impact: NDArray[np.float32], labels: NDArray[np.int64], num_sub_experts: int, switched_off: int | None
) -> float:
    """The objective (arXiv 2510.19366, phase 1.2): the K smallest sub-expert masses, summed over tokens.

    Args:
        impact: [B, C] non-negative.
        labels: [C] in [0, N); sizes need not be equal, so that other clusterings can be judged too.
        num_sub_experts: N.
        switched_off: K, or None for the mean over K = 1..N-1.

    Returns:
        The lost mass in the unit of ``impact``. Zero for N = 1.

    Raises:
        PrismError: an ill-posed problem, or labels of another shape or range.
    """
    impact = check_problem(impact, num_sub_experts, switched_off)
    if labels.shape != (impact.shape[1],) or labels.min() < 0 or labels.max() >= num_sub_experts:
        raise PrismError(
            f"labels must be {impact.shape[1]} values in 0..{num_sub_experts - 1}, got shape {labels.shape} "
            f"with values in {labels.min()}..{labels.max()}"
        )
    if num_sub_experts == 1:
        return 0.0
    ascending = np.sort(sub_expert_masses(impact, labels, num_sub_experts), axis=1)
    lost_per_rank = np.cumsum(ascending.sum(axis=0))[:-1]
    return float(lost_per_rank.mean() if switched_off is None else lost_per_rank[switched_off - 1])


def relative_dropped_mass(
    impact: NDArray[np.float32], labels: NDArray[np.int64], num_sub_experts: int, switched_off: int | None
) -> float:
    """:func:`dropped_mass` as a share of the total mass, in [0, 1]; zero for an expert that is never active."""
    dropped = dropped_mass(impact, labels, num_sub_experts, switched_off)
    total = float(impact.sum(dtype=np.float64))
    return dropped / total if total > 0 else 0.0

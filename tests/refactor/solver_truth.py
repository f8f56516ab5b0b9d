"""The optimum of small problems by trying every partition."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moe_prism.refactor.solvers import dropped_mass


def partitions(neurons: int, n: int) -> Iterator[np.ndarray]:
    """Labels of every partition into n equal sizes, each once up to the sub-experts' names."""
    size = neurons // n
    labels = np.empty(neurons, np.int64)

    def place(neuron: int, counts: list[int]) -> Iterator[np.ndarray]:
        if neuron == neurons:
            yield labels.copy()
            return
        for s in range(n):
            if counts[s] < size:
                labels[neuron] = s
                yield from place(neuron + 1, [c + (m == s) for m, c in enumerate(counts)])
            if counts[s] == 0:  # the empty ones after this are the same by another name
                break

    yield from place(0, [0] * n)


def optimum(impact: np.ndarray, n: int, k: int | None) -> float:
    """The least dropped mass that any partition reaches."""
    return min(dropped_mass(impact, labels, n, k) for labels in partitions(impact.shape[1], n))

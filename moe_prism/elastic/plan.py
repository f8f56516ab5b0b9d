"""How a budget is spent inside a layer: on whole sub-experts, or on the best neurons of more of them.

A neuron's gate row is a third of its weights. A budget of K sub-experts pays for K of them whole, or for the gate
rows of m > K sub-experts and then up and down rows of those neurons only whose gates make them matter. Knows nothing
of scores or weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def most_looked_at(k_active: int, size: int, block: int = 1) -> int:
    """Sub-experts whose gate rows a budget can read and still pay for up and down rows of one block of neurons."""
    return 3 * k_active - -(-2 * block // size)


def neurons_within(k_active: int, scan: int, size: int, block: int = 1) -> int:
    """Neurons whose up and down rows a budget pays for after ``scan`` sub-experts' gate rows, in whole blocks.

    ``3 K size`` rows are paid, gate rows cost ``scan * size`` and a neuron that runs two more. Rounding down keeps the
    cost within the budget, ``most_looked_at`` leaves enough for a block.
    """
    return min(scan * size, (3 * k_active - scan) * size // 2 // block * block)


class Plan:
    """The number of sub-experts looked at and of neurons run, for every budget.

    Attributes:
        scan: int64 ``[full + 1]``, sub-experts whose gate rows are read, by budget; index 0 is not used.
        neurons: int64 ``[full + 1]``, neurons that then run.
        skips: bool ``[full + 1]``, whether that is fewer than were looked at.
        size: neurons of a sub-expert.
        block: neurons that are chosen together; it divides ``size``.
    """

    def __init__(self, scan: Sequence[int], size: int, block: int = 1) -> None:
        """``scan[K - 1]`` for every budget K; ``size`` neurons of a sub-expert, chosen in blocks of ``block``."""
        self.size, self.block = size, block
        self.scan = torch.tensor([0, *scan])
        self.neurons = torch.tensor([0, *(neurons_within(k, m, size, block) for k, m in enumerate(scan, 1))])
        self.skips = torch.tensor([False, *(m > k for k, m in enumerate(scan, 1))])

    def products(self, k_active: int) -> float:
        """Rows that a token multiplies: gate rows of every neuron looked at, up and down rows of those that run."""
        return int(self.scan[k_active]) * self.size + 2 * int(self.neurons[k_active])

    def rows_read(self, k_active: int) -> float:
        """The bytes that it reads, in rows of stored weights."""
        return self.products(k_active)

"""Run time: an elastic model, its dial, selection and executors."""

from .model import (
    CostShares,
    attach,
    budget,
    cost_shares,
    full_budget,
    load_elastic,
    routed_experts,
    set_budget,
)

__all__ = [
    "CostShares",
    "attach",
    "budget",
    "cost_shares",
    "full_budget",
    "load_elastic",
    "routed_experts",
    "set_budget",
]

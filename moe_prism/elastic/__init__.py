"""Run time: an elastic model, its dial, selection and executors."""

from .budgets import budget, dial_of, full_budget, routed_experts, set_budget
from .cost import CostShares, budget_within, cost_shares
from .model import attach, load_elastic

__all__ = [
    "CostShares",
    "attach",
    "budget",
    "budget_within",
    "cost_shares",
    "dial_of",
    "full_budget",
    "load_elastic",
    "routed_experts",
    "set_budget",
]

"""The online scheduling engine: requests, cost model, policies, simulator. Imports no torch and knows no engine."""

from .cost_model import CostModel, StepLoad
from .policies import POLICIES, Policy
from .requests import Limits, Request, Running, State, StepPlan

__all__ = ["POLICIES", "CostModel", "Limits", "Policy", "Request", "Running", "State", "StepLoad", "StepPlan"]

"""The online scheduling engine: requests, cost model, policies, simulator. Imports no torch and knows no engine."""

from .admission import Admission, Unmeetable
from .cost_model import CostModel
from .outcomes import Job, Outcome
from .policies import POLICIES, Policy
from .requests import Limits, Request, Running, State, StepPlan
from .step_load import StepLoad

__all__ = [
    "POLICIES",
    "Admission",
    "CostModel",
    "Job",
    "Limits",
    "Outcome",
    "Policy",
    "Request",
    "Running",
    "State",
    "StepLoad",
    "StepPlan",
    "Unmeetable",
]

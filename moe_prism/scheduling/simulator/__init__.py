"""Policies over a cost model instead of an engine: see ``simulate``."""

from .replica import Job, Outcome
from .run import Router, Simulation, simulate

__all__ = ["Job", "Outcome", "Router", "Simulation", "simulate"]

"""Policies over a cost model instead of an engine: see ``simulate``."""

from .router import Router
from .run import Simulation, simulate

__all__ = ["Router", "Simulation", "simulate"]

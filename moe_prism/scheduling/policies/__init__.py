"""Scheduling policies, by name: see ``POLICIES``."""

from . import ablation, batches, continuous
from .base import POLICIES, Policy

__all__ = ["POLICIES", "Policy", "ablation", "batches", "continuous"]

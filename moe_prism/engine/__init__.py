"""The embedded engine: a policy's plans on an elastic model with real forward passes."""

from .engine import Engine
from .requests import EngineStats, FailedEvent, Generation, Sampling, TokenEvent

__all__ = ["Engine", "EngineStats", "FailedEvent", "Generation", "Sampling", "TokenEvent"]

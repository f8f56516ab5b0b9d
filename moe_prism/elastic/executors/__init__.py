"""Executors: a selection and the expert weights become the layer's output."""

from .base import EXECUTORS, Executor, NeuronRule
from .choice import AUTO, choose_executor
from .cpu import CpuExecutor
from .grouped import GroupedExecutor
from .masked import MaskedExecutor
from .panels import PanelsExecutor
from .reference import ReferenceExecutor
from .triton import TritonExecutor

__all__ = [
    "AUTO",
    "EXECUTORS",
    "CpuExecutor",
    "Executor",
    "GroupedExecutor",
    "MaskedExecutor",
    "NeuronRule",
    "PanelsExecutor",
    "ReferenceExecutor",
    "TritonExecutor",
    "choose_executor",
]

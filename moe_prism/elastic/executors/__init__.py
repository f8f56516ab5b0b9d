"""Executors: a selection and the expert weights become the layer's output."""

from .masked import run_masked
from .reference import run_reference

__all__ = ["run_masked", "run_reference"]

"""Executors: a selection and the expert weights become the layer's output."""

from .reference import run_reference

__all__ = ["run_reference"]

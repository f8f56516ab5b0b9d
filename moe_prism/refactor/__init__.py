"""The offline engine: a stock MoE checkpoint becomes an elastic one."""

from .pipeline import Refactored, load_stock, make_elastic, refactor_model, write_refactored
from .recipe import Recipe

__all__ = ["Recipe", "Refactored", "load_stock", "make_elastic", "refactor_model", "write_refactored"]

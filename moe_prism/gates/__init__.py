"""Gates: which of a token's sub-experts matter. One file each, fit and score side by side."""

from . import linear, probe, proxy, static
from .base import GATES, Cost, ExpertProfile, Gate, LayerShape, Scores

__all__ = ["GATES", "Cost", "ExpertProfile", "Gate", "LayerShape", "Scores", "linear", "probe", "proxy", "static"]

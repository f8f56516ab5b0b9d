"""Partitioning solvers: how an expert's neurons are split into sub-experts. One file per method.

Example::

    solver = SOLVERS.create("balanced", {"runs": 8, "polish_rounds": 10})
    labels = solver.solve(impact, num_sub_experts=4, switched_off=2, seed=0)
"""

from . import annealing, balanced, contiguous, greedy, importance  # noqa: F401 (importing registers)
from .base import BEST_SOLVER, SOLVERS, Solver
from .objective import dropped_mass, relative_dropped_mass

__all__ = ["BEST_SOLVER", "SOLVERS", "Solver", "dropped_mass", "relative_dropped_mass"]

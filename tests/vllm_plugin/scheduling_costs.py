"""Two cost models for planners."""

from __future__ import annotations

from moe_prism.scheduling import CostModel
from moe_prism.scheduling.step_load import TERMS


def free() -> CostModel:
    """Every step takes no time."""
    return CostModel(tuple(1e-9 for _ in TERMS), 16, 32)


def expensive() -> CostModel:
    """A token at full budget takes 20 ms, of which 16 are in proportion to its budget."""
    seconds = {"decode_tokens": 0.004, "decode_work": 0.016, "prefill_tokens": 0.002, "prefill_work": 0.008}
    return CostModel(tuple(seconds.get(term, 0.0) for term in TERMS), 16, 32)

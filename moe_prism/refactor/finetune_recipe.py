"""The section ``finetune`` of a recipe: how the gate is trained. Knows nothing of tensors."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Finetune(BaseModel):
    """Training of the gate and of what is stored beside it; the model's own weights are never touched.

    Example::

        finetune:
          objective: distillation
          steps: 300
          batch: 8
          learning_rate: 0.02
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    objective: Literal["cross-entropy", "distillation"] = Field(
        "distillation",
        description="cross-entropy = the language-modelling loss at the budget, as in the paper; distillation = KL of "
        "the full model's next-token distribution to that at the budget, relative to its size at each budget, which "
        "needs one more forward pass a step.",
    )
    steps: int = Field(300, ge=1, description="Steps of Adam.")
    batch: int = Field(
        8,
        ge=1,
        description="Windows of the recipe's context in a step, each with a budget of its own. steps x batch windows "
        "of the text are read; where it has fewer, they come again in another order.",
    )
    learning_rate: float = Field(
        0.02,
        gt=0,
        le=1,
        description="Relative to what is trained: a step changes a tensor by about this part of its root mean square, "
        "and a non-negative one (scores, scales) by about this much of its logarithm. It warms up over a twentieth "
        "of the steps and falls to zero with the root of what is left.",
    )
    curriculum: Literal["mixed", "rising"] = Field(
        "mixed",
        description="mixed = the budgets of a batch are spread over the shares, drawn anew every step; rising = all "
        "windows of a step have one budget, which grows from the lower share to the upper one, as in the paper.",
    )
    shares: tuple[float, float] = Field(
        (0.15, 0.85), description="Least and largest share of full budget that is trained, within (0, 1)."
    )

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        low, high = self.shares
        if not 0 < low <= high < 1:
            raise ValueError(f"shares must ascend within (0, 1), got {low} and {high}")
        return self

"""The recipe: everything that decides what ``refactor`` makes of a model, as one validated object.

A recipe is YAML on disk and is stored in the checkpoint. Knows the names of methods, not the methods.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import PrismError


class Recipe(BaseModel):
    """What ``refactor`` does. Every field has a default, so an empty recipe is valid.

    Example::

        num_sub_experts: 4
        solver: balanced
        gate: proxy
        gate_options: {gate_neurons: 4}
        calibration_tokens: 20000
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_sub_experts: int = Field(
        4, ge=1, description="N, sub-experts of one expert; it must divide the neurons of an expert. The paper uses 4."
    )
    solver: str = Field(
        "balanced", description="How neurons are partitioned: balanced, annealing, greedy, importance, contiguous."
    )
    solver_options: dict[str, Any] = Field(default_factory=dict, description="Options of that solver.")
    switched_off: int | None = Field(
        None,
        ge=1,
        description="Sub-experts of an expert that the partition is optimised for losing; null: the mean over 1..N-1, "
        "so that the whole dial benefits.",
    )
    impact: Literal["activation", "output"] = Field(
        "output",
        description="A neuron's impact on a token: activation = |activation| as in the paper; output = routing weight "
        "x |activation| x norm of the neuron's down weights, which bounds what its absence changes.",
    )
    gate: str = Field("proxy", description="What scores sub-experts at run time: proxy, linear, static.")
    gate_options: dict[str, Any] = Field(default_factory=dict, description="Options of that gate.")
    neurons: Literal["auto", "gate-first", "all"] = Field(
        "all",
        description="all = a budget runs whole sub-experts; gate-first = it reads the gate rows of more of them and "
        "runs only the neurons whose gates make them matter, at the same cost; how many are looked at is measured per "
        "budget. auto = gate-first where every expert is silu(gate) * up without biases and the gate computes no "
        "neurons, else all.",
    )
    compensation_budgets: int = Field(
        0,
        ge=0,
        description="Budgets at which the mean of what is skipped is fitted, one vector per expert, and added back; "
        "interpolated between. 0: nothing is added. 8 are enough.",
    )
    token_budgets: Literal["equal", "shared"] = Field(
        "equal",
        description="equal = every token of a request runs its budget; shared = tokens with concentrated scores run "
        "less and others more, with the budget as the request's mean, which then need not be a whole number; how far "
        "they depart is measured per budget.",
    )
    layer_budgets: Literal["uniform", "measured"] = Field(
        "uniform",
        description="uniform = a budget is the same in every layer; measured = layers that lose more by a small budget "
        "get more and the others less, with the same mean: chosen from KL to the full model on calibration text.",
    )
    points: list[Annotated[float, Field(gt=0, le=1)]] | Literal["auto"] = Field(
        default_factory=list,
        description="Shares of full budget that are measured and published as operating points, e.g. [0.25, 0.5, 1]; "
        "empty: every budget. Where neighbours cannot be told apart, fewer points say as much. auto: those that "
        "calibration text says can be told apart on points_tokens.",
    )
    points_tokens: int = Field(
        65_536, ge=256, description="Tokens that automatic points will be measured on; more tell more points apart."
    )
    methods: Literal["given", "auto"] = Field(
        "given",
        description="given = the fields above. auto = the best of the methods known here, by KL to the full model at "
        "equal cost on calibration text that nothing is fitted on; it replaces their fields, and the checkpoint says "
        "what was tried.",
    )
    time_limit: float = Field(150.0, gt=0, description="Seconds after which methods: auto tries nothing new.")
    calibration_tokens: int = Field(20_000, ge=256, description="Tokens of calibration text run through the model.")
    context: int = Field(256, ge=8, description="Tokens of one calibration window.")
    tokens_per_expert: int = Field(
        2_000, ge=16, description="Tokens kept of every expert (a seeded uniform sample of those routed to it)."
    )
    min_tokens_per_expert: int = Field(
        32,
        ge=1,
        description="An expert with fewer routed tokens is reported and profiled on a sample of all tokens instead.",
    )
    seed: int = Field(0, ge=0, description="Seed of sampling and of the solver.")

    @staticmethod
    def load(path: Path) -> Recipe:
        """Read a YAML file; raises PrismError that names the file and every bad field."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PrismError(f"recipe {path} cannot be read: {error}") from None
        return Recipe.parse(text, f"recipe {path}")

    @staticmethod
    def parse(text: str, where: str = "recipe") -> Recipe:
        """A recipe from YAML; raises PrismError that names every bad field."""
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise PrismError(f"{where} cannot be read: {error}") from None
        if value is None:
            value = {}
        if not isinstance(value, dict):
            raise PrismError(f"{where} must be a mapping of fields, got {type(value).__name__}")
        return Recipe.of(value, where)

    @staticmethod
    def of(value: dict[str, Any], where: str = "recipe") -> Recipe:
        """A recipe from a mapping; raises PrismError that names every bad field."""
        try:
            return Recipe.model_validate(value)
        except ValidationError as error:
            known = ", ".join(Recipe.model_fields)
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise PrismError(f"{where}: {problems}. Fields: {known}") from None

    def budgets(self, full_budget: int) -> list[int] | None:
        """The budgets of ``points``, ascending; None for all."""
        if self.points == "auto":
            return None
        return sorted({max(1, round(share * full_budget)) for share in self.points}) or None

    def to_yaml(self) -> str:
        """All fields, with their descriptions as comments."""
        lines = []
        for name, field in Recipe.model_fields.items():
            lines.append(f"# {field.description}")
            lines.append(yaml.safe_dump({name: getattr(self, name)}, default_flow_style=False).strip())
        return "\n".join(lines) + "\n"

"""The recipe: everything that decides what ``refactor`` makes of a model, as one validated object.

A recipe is YAML on disk and is stored in the checkpoint. Knows the names of methods, not the methods.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import PrismError
from .finetune_recipe import Finetune


class Recipe(BaseModel):
    """What ``refactor`` does. Every field has a default, so an empty recipe is valid.

    Example::

        num_sub_experts: 4
        solver: importance
        gate: static
        neurons: auto
        calibration_tokens: 20000
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_sub_experts: int = Field(
        4, ge=1, description="N, sub-experts of one expert; it must divide the neurons of an expert. The paper uses 4."
    )
    solver: str = Field(
        "importance", description="How neurons are partitioned: balanced, annealing, greedy, importance, contiguous."
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
    gate: str = Field("static", description="What scores sub-experts at run time: static, proxy, linear, probe.")
    gate_options: dict[str, Any] = Field(default_factory=dict, description="Options of that gate.")
    neurons: Literal["auto", "gate-first", "all"] = Field(
        "auto",
        description="all = a budget runs whole sub-experts; gate-first = it reads the gate rows of more of them and "
        "runs only the neurons whose gates make them matter, at the same cost; how many are looked at is measured per "
        "budget. auto = gate-first where every expert is silu(gate) * up without biases, gate is static and fold is "
        "false, else all.",
    )
    shadow_bits: Literal[0, 4] = Field(
        0,
        description="4: a copy of the experts is kept whose weights can be read at 4 bits and then raised to 8; "
        "budgets count bytes, and a neuron is skipped, run at 4 bits or run at 8 (needs neurons: gate-first). "
        "0: no copy.",
    )
    neuron_block: int = Field(
        1,
        ge=1,
        description="Neurons that gate-first chooses together, consecutive ones of a sub-expert, by the sum of their "
        "scores; it must divide the neurons of a sub-expert. 1: every neuron by itself, which loses least; blocks are "
        "what a GPU can skip.",
    )
    compensation_budgets: int = Field(
        0,
        ge=0,
        description="Budgets at which the recalibration is fitted; interpolated between. 0: nothing is. 8 are enough.",
    )
    finetune: Finetune | None = Field(
        None,
        description="Training of the gate's tensors, neuron scales and compensation, the last stage: objective, steps, "
        "batch, learning_rate, curriculum, shares. The model's own weights are not touched. null: none.",
    )
    recalibration: Literal["mean", "scale", "renormalise"] = Field(
        "mean",
        description="What is fitted: mean = the mean of what is skipped, one vector per expert, added back; scale = a "
        "scale and a shift for every dimension of the layer's output. renormalise fits nothing: routing weights of the "
        "experts that run are scaled to the sum of all routed ones.",
    )
    fold: bool = Field(
        False,
        description="true: the weight of an expert of which only some sub-experts run is scaled, by ridge regression, "
        "so that they stand for all of it (not with neurons: gate-first).",
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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.recalibration == "scale" and not self.compensation_budgets:
            raise ValueError("recalibration: scale needs compensation_budgets of 1 or more, e.g. 8")
        if self.recalibration == "renormalise" and self.compensation_budgets:
            raise ValueError("recalibration: renormalise fits nothing; set compensation_budgets: 0")
        if self.shadow_bits and self.neurons != "gate-first":
            raise ValueError(f"shadow_bits: {self.shadow_bits} needs neurons: gate-first, got {self.neurons}")
        if self.neuron_block > 1:
            self._check_blocks()
        if self.fold and self.neurons == "gate-first":
            raise ValueError("fold: true scales whole sub-experts; set neurons: all")
        if self.fold and self.finetune is not None:
            raise ValueError("finetune trains without folding; set fold: false")
        return self

    def _check_blocks(self) -> None:
        blocks = f"neuron_block: {self.neuron_block}"
        if self.neurons != "gate-first":
            raise ValueError(f"{blocks} needs neurons: gate-first, got {self.neurons}; or set neuron_block: 1")
        if self.methods == "auto":
            raise ValueError(f"{blocks} is not among the methods: auto tries; set methods: given or neuron_block: 1")
        if self.shadow_bits:
            raise ValueError(f"{blocks} needs shadow_bits: 0; the ladder takes single neurons (neuron_block: 1)")
        if self.finetune is not None:
            raise ValueError(f"{blocks} cannot be finetuned, since finetune trains single neurons; set neuron_block: 1")

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
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'fields'}: {e['msg']}" for e in error.errors())
            raise PrismError(f"{where}: {problems}. Fields: {known}") from None

    def budgets(self, full_budget: int) -> list[int] | None:
        """The budgets of ``points``, ascending; None for all."""
        if self.points == "auto":
            return None
        return sorted({max(1, round(share * full_budget)) for share in self.points}) or None

    def to_yaml(self) -> str:
        """All fields, with their descriptions as comments."""
        lines = []
        values = self.model_dump(mode="json")
        for name, field in Recipe.model_fields.items():
            lines.append(f"# {field.description}")
            lines.append(yaml.safe_dump({name: values[name]}, default_flow_style=False).strip())
        return "\n".join(lines) + "\n"

"""What an elastic checkpoint says about itself: the key "moe_prism" of config.json and operating_points.json.

Pure pydantic: knows nothing of tensors, of directories or of how a point was measured, and imports no torch.
Constructing a model with impossible values raises pydantic's ``ValidationError`` (a ``ValueError``); the
``parse_*`` functions, made for files, turn that into a :class:`~moe_prism.errors.CheckpointError`.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import CheckpointError

SCHEMA_VERSION = 1
CONFIG_KEY = "moe_prism"  # the key in config.json and, as attribute, on a transformers config

# Ours lie in a subfolder because some engines load every *.safetensors they see at the top.
OUR_FOLDER = "moe_prism/"
TENSORS_FILE = "moe_prism/tensors.safetensors"
RECIPE_FILE = "moe_prism/recipe.yaml"
OPERATING_POINTS_FILE = "moe_prism/operating_points.json"
COST_MODEL_FILE = "moe_prism/cost_model.json"
PLOT_FILE = "moe_prism/frontier.png"
CARD_FILE = "README.md"

# KL is summed in fp32 and may come out a hair below zero for two equal distributions.
_KL_ROUNDING = 1e-3
# ppl and share are redundant with nll and k; files may round them to a few digits.
_ROUNDING = 1e-3


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def to_json(self) -> str:
        """Indented JSON with a final newline; the matching ``parse_*`` function reads it back to an equal object."""
        return self.model_dump_json(indent=2) + "\n"


class Calibration(_Frozen):
    """The text the activations were profiled on."""

    text: str = Field(description="Name of the text, not a path on the machine that made it.")
    tokens: int = Field(ge=0, description="Tokens of it that were run through the model.")


class Try(_Frozen):
    """One method that was tried on top of the best so far."""

    name: str = Field(min_length=1, description="What was tried.")
    changes: dict[str, Any] = Field(description="Fields of the recipe that it sets.")
    kl: list[float] = Field(default_factory=list, description="KL to the full model at every share; empty: not tried.")
    seconds: float = Field(default=0.0, ge=0, description="What refactoring and measuring took.")
    outcome: str = Field(min_length=1, description='"kept", "no better", or why it was not tried.')


class Choice(_Frozen):
    """How the methods of the recipe were chosen."""

    text: str = Field(min_length=1, description="Name of the calibration text, of which a part was held out.")
    tokens: int = Field(ge=1, description="Tokens held out.")
    shares: list[float] = Field(min_length=1, description="Shares of routed work at which KL was measured.")
    time_limit: float = Field(gt=0, description="Seconds after which nothing new was tried.")
    tries: list[Try] = Field(min_length=1, description="In order; each on top of those kept before.")


class ElasticConfig(_Frozen):
    """The value of the key "moe_prism" in config.json.

    All expert layers of a checkpoint share ``num_experts``, ``num_neurons`` and ``top_k``.
    """

    version: int = Field(default=SCHEMA_VERSION, ge=1, le=SCHEMA_VERSION, description="Schema version.")
    num_sub_experts: int = Field(ge=1, description="N: sub-experts per expert; divides num_neurons.")
    num_experts: int = Field(ge=1, description="E: routed experts per layer.")
    num_neurons: int = Field(ge=1, description="C: neurons per expert.")
    top_k: int = Field(ge=1, description="k: routed experts per token of the original model.")
    full_budget: int = Field(ge=1, description="k*N: the budget that equals the original model.")
    gate: str = Field(min_length=1, description="Registered name of the gate.")
    gate_options: dict[str, Any] = Field(default_factory=dict, description="Options the gate was fitted with.")
    solver: str = Field(min_length=1, description="Registered name of the partitioning solver.")
    seed: int = Field(description="Seed of calibration sampling and solver.")
    layers: list[str] = Field(
        min_length=1, description='Module names of the refactored expert layers, e.g. "model.layers.0.mlp.experts".'
    )
    scan: list[int] | None = Field(
        default=None,
        description="For every budget K = 1..full_budget, how many sub-experts' gate rows are read before neurons are "
        "chosen inside them; K itself where all their neurons run. Null: no budget skips neurons.",
    )
    neuron_block: int = Field(
        default=1,
        ge=1,
        description="Neurons that are chosen together inside sub-experts, by the sum of their scores.",
    )
    ladder: list[tuple[int, int, int]] | None = Field(
        default=None,
        description="For every budget K = 1..full_budget - 1: sub-experts whose gate rows are read at 4 bits, "
        "neurons of these that run at 4 bits or more, neurons of these that run at 8. "
        "Null: budgets read the stored weights.",
    )
    compensated: list[int] = Field(
        default_factory=list, description="Ascending budgets that the layers' compensation vectors were fitted at."
    )
    recalibration: Literal["mean", "scale", "renormalise"] = Field(
        default="mean",
        description="What is done to a layer's output below full budget. mean and scale: with the vectors fitted at "
        "the compensated budgets, if any; renormalise: routing weights of the experts that run keep their sum.",
    )
    folded: bool = Field(
        default=False,
        description="The weight of an expert of which only some sub-experts run is scaled by the layers' factors.",
    )
    sharing: list[float] | None = Field(
        default=None,
        description="For every budget K = 1..full_budget, how far tokens of a request depart from K as their scores "
        "ask for, from 0 to 1, with K as their mean. Null: every token gets K.",
    )
    layer_budgets: list[list[int]] | None = Field(
        default=None,
        description="For every budget K = 1..full_budget, the budget of every layer; their mean is at most K. Null: K "
        "in every layer.",
    )
    choice: Choice | None = Field(default=None, description="How methods were chosen; null: the recipe named them.")
    calibration: Calibration
    weights_dtype: str = Field(min_length=1, description='Storage type of the expert weights, e.g. "bfloat16".')
    created_with: dict[str, str] = Field(default_factory=dict, description="Package name -> version.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.num_neurons % self.num_sub_experts:
            raise ValueError(
                f"num_sub_experts {self.num_sub_experts} does not divide num_neurons {self.num_neurons}: "
                "sub-experts have equal sizes"
            )
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is more than num_experts {self.num_experts}")
        if self.full_budget != self.top_k * self.num_sub_experts:
            raise ValueError(
                f"full_budget {self.full_budget} is not top_k * num_sub_experts = {self.top_k * self.num_sub_experts}"
            )
        if len(set(self.layers)) != len(self.layers):
            raise ValueError("layers names a layer twice")
        self._check_plan()
        return self

    def _check_plan(self) -> None:
        size = self.num_neurons // self.num_sub_experts
        if self.neuron_block > 1 and (self.scan is None or size % self.neuron_block):
            raise ValueError(
                f"neuron_block {self.neuron_block} needs scan, and sub-experts of {size} neurons that it divides"
            )
        if self.scan is not None:
            if len(self.scan) != self.full_budget:
                raise ValueError(
                    f"scan has {len(self.scan)} numbers, needed is one for every budget: {self.full_budget}"
                )
            for k, scan in enumerate(self.scan, 1):
                most = min(self.full_budget, 3 * k - -(-2 * self.neuron_block // size))
                if not k <= scan <= most:
                    raise ValueError(f"scan of budget {k} must be from {k} to {most}, got {scan}")
        if self.ladder is not None:
            self._check_ladder(self.ladder)
        fitted = self.compensated
        if fitted != sorted(set(fitted)) or any(not 1 <= k < self.full_budget for k in fitted):
            raise ValueError(f"compensated must ascend within 1..{self.full_budget - 1}, got {fitted}")
        if self.sharing is not None and (
            len(self.sharing) != self.full_budget or not all(0 <= part <= 1 for part in self.sharing)
        ):
            raise ValueError(f"sharing must be {self.full_budget} numbers from 0 to 1, got {self.sharing}")
        if self.layer_budgets is not None:
            _check_layer_budgets(self.layer_budgets, len(self.layers), self.full_budget)

    def _check_ladder(self, ladder: Sequence[tuple[int, int, int]]) -> None:
        if self.scan is not None:
            raise ValueError("scan and ladder are two ways to spend a budget; give one")
        if len(ladder) != self.full_budget - 1:
            raise ValueError(
                f"ladder has {len(ladder)} rungs, needed is one for every budget below full: {self.full_budget - 1}"
            )
        size = self.num_neurons // self.num_sub_experts
        for k, (scan, neurons, raised) in enumerate(ladder, 1):
            if not (1 <= scan <= self.full_budget and 1 <= neurons <= scan * size and 0 <= raised <= neurons):
                raise ValueError(f"rung {scan, neurons, raised} of budget {k} is impossible")
            # 4.5 bits a weight with scales, 4 more where it is raised, 16 as stored
            if (scan * size + 2 * neurons) * 4.5 + 3 * raised * 4 > 3 * k * size * 16:
                raise ValueError(f"rung {scan, neurons, raised} reads more than budget {k} pays for")


class _Point(_Frozen):
    share: float = Field(gt=0, le=1, description="Fraction of the routed-expert work.")
    nll: float = Field(ge=0, description="Mean token loss, nats per token.")
    ppl: float = Field(ge=1, description="Perplexity: exp(nll).")
    kl: float = Field(ge=-_KL_ROUNDING, description="Mean KL(full model || this point), nats per token.")
    top1_agreement: float = Field(ge=0, le=1, description="Share of tokens whose argmax is the full model's.")
    distinct: bool = Field(description="Differs from its neighbours by more than two paired standard errors.")
    stable: bool | None = Field(
        default=None, description="The order holds on a second text and calibration seed; null: not checked."
    )

    @model_validator(mode="after")
    def _perplexity_is_exp_of_loss(self) -> Self:
        # compared as logarithms: exp of a broken model's loss may overflow
        if abs(math.log(self.ppl) - self.nll) > _ROUNDING * max(1.0, self.nll):
            raise ValueError(f"ppl {self.ppl} is not exp(nll) for nll {self.nll}")
        return self


class OperatingPoint(_Point):
    """One budget of the elastic model with its measured quality and cost."""

    k_active: int = Field(ge=1, description="Budget: sub-experts a token may run in a layer.")
    flops_share: float = Field(ge=0, description="Routed FLOPs including the gate, over the original's; may pass 1.")
    bytes_share: float = Field(ge=0, description="Expert bytes read per token including the gate, over the original's.")
    stderr: float | None = Field(
        default=None,
        ge=0,
        description="Paired standard error of the loss difference to the next higher measured budget; null for the "
        "highest.",
    )


class BaselinePoint(_Point):
    """The original model run with fewer whole experts: the comparison at equal compute."""

    k: int = Field(ge=1, description="Routed experts per token.")


class DistinctStable(_Frozen):
    """How many points are distinct and stable; null where stability was not checked."""

    elastic: int | None = Field(default=None, ge=0)
    baseline: int | None = Field(default=None, ge=0)


class PhasePoint(_Frozen):
    """A budget for the prompt and another for what follows it."""

    prefill: int = Field(ge=1, description="Budget of the prompt's tokens.")
    decode: int = Field(ge=1, description="Budget of the continuation's tokens.")
    excess: float = Field(description="Loss of continuation tokens over the full model's, nats per token.")
    stderr: float = Field(ge=0, description="Paired standard error of the excess.")


class Phases(_Frozen):
    """Excess loss of continuations by the budgets of both phases: what a scheduler may save in which."""

    text: str = Field(min_length=1, description="Name of the evaluation text.")
    prompt_tokens: int = Field(ge=1, description="Tokens of every prompt.")
    tokens: int = Field(ge=1, description="Continuation tokens measured, over all prompts.")
    points: list[PhasePoint] = Field(
        min_length=1, description="Every pair of the measured budgets: by prefill, then by decode budget."
    )

    @model_validator(mode="after")
    def _is_a_grid(self) -> Self:
        budgets = sorted({k for point in self.points for k in (point.prefill, point.decode)})
        if [(p.prefill, p.decode) for p in self.points] != list(itertools.product(budgets, budgets)):
            raise ValueError(f"phases must hold every pair of {budgets} once, by prefill and then by decode budget")
        return self


class OperatingPoints(_Frozen):
    """operating_points.json: measured budget -> quality and cost, on what text, with which seeds and versions."""

    version: int = Field(default=SCHEMA_VERSION, ge=1, le=SCHEMA_VERSION, description="Schema version.")
    full_budget: int = Field(ge=1, description="k*N of the checkpoint.")
    text: str = Field(min_length=1, description="Name of the evaluation text.")
    tokens: int = Field(ge=1, description="Predicted tokens.")
    seed: int = Field(description="Calibration seed of the measured checkpoint.")
    second_text: str | None = Field(default=None, description="Held-out text of the stability check.")
    second_seed: int | None = Field(default=None, description="Calibration seed of the stability check.")
    versions: dict[str, str] = Field(description="Package name -> version.")
    machine: dict[str, str | int | float] = Field(description='What it ran on, e.g. {"cpu": "...", "cores": 2}.')
    elastic: list[OperatingPoint] = Field(min_length=1, description="By ascending budget.")
    baseline: list[BaselinePoint] = Field(default_factory=list, description="By ascending number of experts.")
    distinct_stable: DistinctStable
    full_budget_max_logit_diff: float | None = Field(
        ge=0, description="max |logit difference| to the original model at full budget; null: no original to compare."
    )
    paper_gates: dict[str, list[OperatingPoint]] = Field(
        default_factory=dict,
        description="Other gates measured beside, by name, on the same text. Of a coarser one, k_active is in the "
        "sub-experts of this model.",
    )
    phases: Phases | None = Field(default=None, description="Budgets of prompt and continuation; null: not measured.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, points in {"elastic": self.elastic, **self.paper_gates}.items():
            budgets = [p.k_active for p in points]
            _check_ascending(name, "k_active", budgets, self.full_budget)
            for point in points:
                _check_share(name, point.k_active, self.full_budget, point.share)
        if self.baseline:
            _check_ascending("baseline", "k", [p.k for p in self.baseline], self.full_budget)
            top_k = round(self.baseline[-1].k / self.baseline[-1].share)
            if self.full_budget % top_k:
                raise ValueError(f"baseline shares mean top_k {top_k}, which does not divide {self.full_budget}")
            for baseline_point in self.baseline:
                _check_share("baseline", baseline_point.k, top_k, baseline_point.share)
        _check_count("elastic", self.elastic, self.distinct_stable.elastic)
        _check_count("baseline", self.baseline, self.distinct_stable.baseline)
        if self.phases is not None and self.phases.points[-1].prefill > self.full_budget:
            raise ValueError(f"phases: budget {self.phases.points[-1].prefill} is not in 1..{self.full_budget}")
        return self


def permutation_key(layer: str) -> str:
    """Name in tensors.safetensors of a layer's permutation.

    An int32 tensor ``[E, C]``: new neuron position j of expert e holds original neuron ``permutation[e, j]``.
    """
    return f"{layer}.permutation"


def parse_elastic_config(value: Any) -> ElasticConfig:
    """The validated form of ``config.json["moe_prism"]``.

    Raises:
        CheckpointError: a future version, or a missing, unknown or impossible field (named).
    """
    return _parse(ElasticConfig, value, 'config.json: "moe_prism"')


def parse_operating_points(text: str | bytes) -> OperatingPoints:
    """The validated content of operating_points.json.

    Raises:
        CheckpointError: not JSON, a future version, or a missing, unknown or impossible field (named).
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f"operating_points.json is not valid JSON: {error}; measure anew with `moe-prism sweep`"
        ) from None
    return _parse(OperatingPoints, value, "operating_points.json")


_Model = TypeVar("_Model", ElasticConfig, OperatingPoints)


def _parse(model: type[_Model], value: Any, where: str) -> _Model:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be an object, got {type(value).__name__}")
    # Before the fields: a newer schema has unknown ones, and "upgrade" is then the useful answer.
    version = value.get("version")
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{where} has no schema version (got {version!r}); it was not written by moe-prism")
    if version > SCHEMA_VERSION:
        raise CheckpointError(
            f"{where} was written by schema version {version}, this moe-prism reads up to {SCHEMA_VERSION}; "
            "upgrade moe-prism"
        )
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, e['loc'])) or 'fields'}: {e['msg']}" for e in error.errors(include_url=False)[:5]
        ]
        raise CheckpointError(f"{where} is invalid: {'; '.join(problems)}") from None


def _check_layer_budgets(table: Sequence[Sequence[int]], layers: int, full: int) -> None:
    if len(table) != full or any(len(row) != layers for row in table):
        raise ValueError(f"layer_budgets must have {full} rows (budgets) of {layers} numbers (layers)")
    before = [1] * layers
    for k, row in enumerate(table, 1):
        if any(not low <= mine <= full for low, mine in zip(before, row, strict=True)):
            raise ValueError(f"layer_budgets of {k} must be from {list(before)} (those of {k - 1}) to {full}: {row}")
        if sum(row) > k * layers or (k == full and min(row) < full):
            raise ValueError(f"the mean of layer_budgets of {k} must be at most {k}, and {full} at full budget: {row}")
        before = list(row)


def _check_ascending(name: str, field: str, values: Sequence[int], limit: int) -> None:
    if any(a >= b for a, b in itertools.pairwise(values)):
        raise ValueError(f"{name}: {field} must ascend without repeats, got {list(values)}")
    if values and values[-1] > limit:
        raise ValueError(f"{name}: {field} {values[-1]} is not in 1..{limit}")


def _check_share(name: str, k: int, full: int, share: float) -> None:
    if abs(share - k / full) > _ROUNDING:
        raise ValueError(f"{name}: share {share} of {k} is not {k}/{full}")


def _check_count(name: str, points: Sequence[_Point], count: int | None) -> None:
    found = sum(p.distinct and p.stable is True for p in points)
    if count is not None and count != found:
        raise ValueError(f"distinct_stable.{name} is {count}, but {found} points are marked distinct and stable")

"""One verb: ``make_elastic(model, out, recipe)`` turns a stock MoE checkpoint into an elastic one.

Calibrate, capture, refactor layer by layer, permute, write. Everything that can be refused is refused
before the first forward pass; what is finished survives a kill. Knows nothing of the command line and
measures no quality (``evaluation`` does).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..checkpoint.atomic import check_disk_space, check_output
from ..checkpoint.card import model_card
from ..checkpoint.schema import CONFIG_KEY, Calibration, ElasticConfig, permutation_key
from ..checkpoint.write import write_checkpoint
from ..elastic.fingerprint import fingerprint
from ..elastic.model import FINGERPRINT
from ..errors import PrismError
from ..evaluation.environment import versions
from ..experts import ExpertLayer, find_expert_layers, permute_neurons
from ..gates import GATES, Gate
from .auto import search_methods
from .calibration import load_calibration
from .capture import capture, capture_bytes, read_layer
from .finetune import check_finetune, training_windows
from .layer import LayerResult, refactor_layer
from .points import with_points
from .recipe import Recipe
from .solvers import SOLVERS
from .solvers.base import Solver
from .tune import skips_neurons, tune
from .workspace import Workspace, model_identity

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all); stages: "sample", "methods", "capture", "layers", those of
``tune`` and "points"."""


class LayerReport(NamedTuple):
    """What became of one layer: relative dropped mass, least and most routed tokens, fallback experts."""

    name: str
    dropped: float
    fewest_tokens: int
    most_tokens: int
    fallbacks: list[int]


class Refactored(NamedTuple):
    """A refactored model in memory.

    Attributes:
        model: its neurons are permuted in place.
        tokenizer: None if the model has none.
        elastic: what config.json says.
        tensors: ours, by checkpoint name.
        reports: one per layer.
        recipe: with everything filled in that was left to be chosen.
    """

    model: PreTrainedModel
    tokenizer: Any
    elastic: ElasticConfig
    tensors: dict[str, Tensor]
    reports: list[LayerReport]
    recipe: Recipe


def load_stock(source: str, dtype: str | torch.dtype = "auto") -> tuple[PreTrainedModel, Any]:
    """A stock model and its tokenizer (None if it has none), from a directory or the hub, in eval mode.

    Args:
        source: directory or name on the hub.
        dtype: of the weights in memory; "auto" is the stored one.

    Raises:
        PrismError: it cannot be loaded, or is already elastic.
    """
    path = Path(source)
    if path.exists() and not (path / "config.json").is_file():
        raise PrismError(f"{source} has no config.json; give a model directory or a model name of the hub")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        raise PrismError(f"{source} cannot be loaded as a causal language model: {error}") from None
    model: PreTrainedModel = loaded[0]
    if getattr(model.config, CONFIG_KEY, None) is not None:
        raise PrismError(f"{source} is elastic already; refactor the original, or `moe-prism restore` it first")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        tokenizer = None
    dropped = sorted(loaded[1]["unexpected_keys"])
    if dropped:
        warnings.warn(
            f"{source}: transformers does not load {len(dropped)} of its tensors ({', '.join(dropped[:3])}, ...); "
            "they will be missing from the elastic checkpoint and from what is restored of it",
            stacklevel=2,
        )
    model.eval()
    return model, tokenizer


def check_recipe(recipe: Recipe, layers: list[ExpertLayer]) -> tuple[Solver, Gate]:
    """The recipe's solver and gate; raises PrismError where they, N or blocks do not fit the layers."""
    for layer in layers:
        if layer.num_neurons % recipe.num_sub_experts:
            raise PrismError(
                f"num_sub_experts must divide the {layer.num_neurons} neurons of an expert, got "
                f"{recipe.num_sub_experts}; possible: {_divisors(layer.num_neurons)}"
            )
        same = (layers[0].num_experts, layers[0].num_neurons, layers[0].top_k)
        if (layer.num_experts, layer.num_neurons, layer.top_k) != same:
            raise PrismError(f"{layer.name} has other sizes than {layers[0].name}; such models are not supported yet")
    if recipe.switched_off is not None and recipe.switched_off >= recipe.num_sub_experts:
        raise PrismError(
            f"switched_off must be from 1 to {recipe.num_sub_experts - 1} (num_sub_experts - 1), "
            f"got {recipe.switched_off}"
        )
    size = layers[0].num_neurons // recipe.num_sub_experts
    if size % recipe.neuron_block:
        raise PrismError(
            f"neuron_block must divide the {size} neurons of a sub-expert, got {recipe.neuron_block}; possible: "
            f"{_divisors(size)}; or change num_sub_experts"
        )
    return SOLVERS.create(recipe.solver, recipe.solver_options), GATES.create(recipe.gate, recipe.gate_options)


def _divisors(number: int) -> str:
    return ", ".join(str(each) for each in range(1, number + 1) if number % each == 0)


def refactor_model(
    model: PreTrainedModel,
    tokenizer: Any,
    recipe: Recipe,
    out: Path,
    text: str | None = None,
    progress: Progress | None = None,
    start: Path | None = None,
    before: str = "windows",
) -> tuple[Refactored, Workspace]:
    """Refactor a loaded model in place; unfinished work is kept beside ``out``.

    Args:
        model: a stock model; its experts' neurons are permuted in place at the very end.
        tokenizer: for ``text``.
        recipe: what to do.
        out: where the checkpoint will go; only its sibling ``OUT.partial/`` is written.
        text: calibration text (see ``load_calibration``); None: the model writes it.
        progress: see ``Progress``.
        start: working folder of another refactoring of the same model, whose finished parts are used.
        before: the stage (``workspace.STAGES``) up to which they are.

    Raises:
        PrismError: the recipe does not fit the model, or leaves the methods open.
    """
    if recipe.methods != "given":
        raise PrismError("methods: auto is chosen by make_elastic; give refactor_model a recipe that names methods")
    layers = find_expert_layers(model)
    solver, gate = check_recipe(recipe, layers)
    skip = skips_neurons(recipe, layers, gate)
    check_finetune(recipe, layers, gate, skip)
    tell = progress or (lambda stage, done, total: None)
    key = {"model": model_identity(model, layers), "recipe": recipe.model_dump(mode="json"), "text": text}
    itemsize = next(model.parameters()).element_size()
    check_disk_space(
        out.parent, model.num_parameters() * itemsize + capture_bytes(layers, recipe.calibration_tokens, itemsize)
    )
    work = Workspace(out, key)
    if start is not None:
        work.inherit(start, before)
    settled = work.windows()
    if settled is None:
        settled = load_calibration(
            text,
            tokenizer,
            model,
            recipe.calibration_tokens,
            recipe.context,
            recipe.seed,
            lambda done, total: tell("sample", done, total),
        )
        work.keep_windows(*settled)
    windows, name = settled
    training = None if recipe.finetune is None else training_windows(text, tokenizer, model, recipe, work, tell)
    results = [work.layer(number) for number in range(len(layers))]
    if any(result is None for result in results):
        capture(model, layers, windows, work.capture_folder, lambda done, total: tell("capture", done, total))
    for number, layer in enumerate(layers):
        if results[number] is None:
            received = read_layer(work.capture_folder, layer)
            results[number] = refactor_layer(layer, number, received, recipe, solver, gate)
            work.keep_layer(number, results[number])  # type: ignore[arg-type]
        tell("layers", number + 1, len(layers))
    finished = [result for result in results if result is not None]
    tensors = _apply(layers, finished)
    elastic = ElasticConfig(
        num_sub_experts=recipe.num_sub_experts,
        num_experts=layers[0].num_experts,
        num_neurons=layers[0].num_neurons,
        top_k=layers[0].top_k,
        full_budget=layers[0].top_k * recipe.num_sub_experts,
        gate=recipe.gate,
        gate_options=recipe.gate_options,
        solver=recipe.solver,
        recalibration=recipe.recalibration,
        seed=recipe.seed,
        layers=[layer.name for layer in layers],
        calibration=Calibration(text=name, tokens=windows.numel()),
        weights_dtype=str(model.dtype).removeprefix("torch."),
        created_with=versions(),
    )
    elastic = tune(model, windows, training, elastic, tensors, recipe, skip, work, tell)
    if recipe.points == "auto":
        recipe = with_points(recipe, model, windows, elastic, tensors, work, tell)
    reports = [
        LayerReport(
            layer.name,
            float(result.dropped.mean()),
            int(result.routed_tokens.min()),
            int(result.routed_tokens.max()),
            result.fallbacks,
        )
        for layer, result in zip(layers, finished, strict=True)
    ]
    return Refactored(model, tokenizer, elastic, tensors, reports, recipe), work


def write_refactored(done: Refactored, out: Path, base_model: str | None) -> None:
    """Write a refactored model as an elastic checkpoint, whole or not at all."""

    def save(folder: Path) -> None:
        done.model.save_pretrained(folder)
        if done.tokenizer is not None:
            done.tokenizer.save_pretrained(folder)

    write_checkpoint(
        out,
        save_model=save,
        elastic=done.elastic,
        tensors=done.tensors,
        recipe_yaml=done.recipe.to_yaml(),
        card=model_card(name=out.name, elastic=done.elastic, recipe_yaml=done.recipe.to_yaml(), base_model=base_model),
        extra_files={"moe_prism/layers.json": _layers_json(done.reports)},
    )


def make_elastic(
    source: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    text: str | None = None,
    compute_dtype: str | torch.dtype = "auto",
    progress: Progress | None = None,
) -> Refactored:
    """Turn a stock MoE checkpoint into an elastic one.

    Args:
        source: model directory, or a name on the hub; it is only read.
        out: a new directory for the elastic checkpoint.
        recipe: what to do; the default recipe if None.
        text: calibration text: file, folder, or data set of the hub; None: the model writes it.
        compute_dtype: of the weights in memory; what is written has the stored dtype. On a processor
            without 16-bit arithmetic "float32" is several times faster and needs twice the memory.
        progress: called while it works.

    Returns:
        The refactored model, which is also on disk.

    Raises:
        PrismError: bad input; nothing was written.

    Example::

        from moe_prism import Recipe, make_elastic

        make_elastic("allenai/OLMoE-1B-7B-0924", "olmoe-elastic", Recipe(num_sub_experts=4), text="wiki.txt")
    """
    recipe = recipe or Recipe()
    out = Path(out)
    check_output(out)
    SOLVERS.create(recipe.solver, recipe.solver_options)
    GATES.create(recipe.gate, recipe.gate_options)
    start, choice, search = None, None, None
    load = partial(load_stock, str(source), compute_dtype)
    if recipe.methods == "auto":
        recipe, choice, start, search = search_methods(recipe, out, text, load, refactor_model, progress)
    model, tokenizer = load()
    done, work = refactor_model(model, tokenizer, recipe, out, text, progress, start, "points")
    done = done._replace(elastic=done.elastic.model_copy(update={"choice": choice}))
    if compute_dtype != "auto":
        # every tensor is written in the dtype it was stored in, so the weights are read again, not cast back
        done = _with_stored_weights(done, str(source))
    base = None if Path(source).exists() else str(source)  # only a name on the hub goes into the card
    write_refactored(done, out, base)
    for each in (work, search):
        if each is not None:
            each.remove()
    return done


def _with_stored_weights(done: Refactored, source: str) -> Refactored:
    model, _ = load_stock(source)
    for layer in find_expert_layers(model):
        permute_neurons(layer, done.tensors[permutation_key(layer.name)])
    dtype = str(model.dtype).removeprefix("torch.")
    return done._replace(model=model, elastic=done.elastic.model_copy(update={"weights_dtype": dtype}))


def _apply(layers: list[ExpertLayer], results: list[LayerResult]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for layer, result in zip(layers, results, strict=True):
        permute_neurons(layer, result.permutation)
        tensors[permutation_key(layer.name)] = result.permutation
        tensors[f"{layer.name}.{FINGERPRINT}"] = fingerprint(layer.module)
        for name, value in result.tensors.items():
            tensors[f"{layer.name}.{name}"] = value
    return tensors


def _layers_json(reports: list[LayerReport]) -> bytes:
    return (json.dumps([r._asdict() for r in reports], indent=1) + "\n").encode()

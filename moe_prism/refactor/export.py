"""An elastic checkpoint as an ordinary one with finer experts, which any engine serves without this package.

Every sub-expert becomes an expert: rows of gate and up and columns of down are split, a token runs ``k * N`` of
``E * N`` experts, and the router has one row per sub-expert, those of the linear gate (arXiv 2510.19366, phase 1.3).
A softmax router gives each of N equal rows an N-th of the expert's weight, so down projections are scaled by N. At
full budget the result computes what the original does, unless the rows were finetuned: then they are its router there
too. ``num_experts_per_tok`` is then the dial. Other gates, neurons chosen inside sub-experts, compensation and folding
need this package at run time and are not exported. Knows no engine.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..checkpoint.atomic import atomic_directory, check_disk_space, check_output
from ..checkpoint.checksums import list_files
from ..checkpoint.read import ElasticCheckpoint, open_checkpoint
from ..checkpoint.schema import CARD_FILE, CONFIG_KEY, OUR_FOLDER
from ..errors import PrismError, UnsupportedModelError
from ..experts import ExpertLayer, find_expert_layers


@dataclass(frozen=True)
class _Fields:
    """Names of a family's settings: how many experts, and neurons of one."""

    experts: str
    neurons: str


# Families whose router is a softmax over all experts, then the top k of it: only there equal rows share a weight.
_EXACT = {
    "olmoe": _Fields("num_experts", "intermediate_size"),
    "mixtral": _Fields("num_local_experts", "intermediate_size"),
    "qwen2_moe": _Fields("num_experts", "moe_intermediate_size"),
    "qwen3_moe": _Fields("num_experts", "moe_intermediate_size"),
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        num_experts: E * N.
        k_active: experts of a token, as its config says.
        renormalises: the family divides routing weights by their sum, so below full budget outputs keep their size,
            and quality is not that of this checkpoint's operating point.
    """

    num_experts: int
    k_active: int
    renormalises: bool


def export_fine_grained(path: Path, out: Path, k_active: int | None = None) -> Exported:
    """Write the finer-grained model to the new directory ``out``.

    Args:
        path: elastic checkpoint; only read.
        out: must not exist, or be empty.
        k_active: experts of a token in the written config, 1 .. k * N; full budget by default. Peak memory is twice
            the model.

    Raises:
        PrismError: ``k_active`` out of range, ``out`` is taken, or the disk too full; before any work.
        UnsupportedModelError: a family, or an N, for which this is not exact; before the weights are read.
    """
    check_output(out)
    if out.expanduser().resolve().is_relative_to(path.expanduser().resolve()):
        raise PrismError(f"output {out} is inside the checkpoint {path}; name a directory outside it")
    checkpoint = open_checkpoint(path)
    full, n = checkpoint.elastic.full_budget, checkpoint.elastic.num_sub_experts
    if k_active is not None and not 1 <= k_active <= full:
        raise PrismError(f"k_active must be from 1 to {full} (full budget), got {k_active}")
    config = AutoConfig.from_pretrained(checkpoint.path)
    fields = _check(config, n)
    check_disk_space(out, sum(file.stat().st_size for file in checkpoint.path.glob("*.safetensors")))

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype="auto")
    fine = _finer(model, config, fields, checkpoint)
    fine.config.num_experts_per_tok = k_active or full
    with atomic_directory(out) as partial:
        fine.save_pretrained(partial)
        for name in list_files(checkpoint.path):
            ours = name.startswith(OUR_FOLDER) or name in (CARD_FILE, "config.json") or ".safetensors" in name
            if not ours:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint.path / name, partial / name)
        _complete_config(checkpoint.path / "config.json", partial / "config.json", fine.config, fields)
    renormalises = bool(getattr(config, "norm_topk_prob", config.model_type == "mixtral"))
    return Exported(getattr(fine.config, fields.experts), k_active or full, renormalises)


def _check(config: Any, n: int) -> _Fields:
    if config.model_type not in _EXACT:
        raise UnsupportedModelError(
            f"{config.model_type} cannot be exported as finer experts: its router does more than a softmax over all "
            f"experts and a top-k (groups, corrections, biases or another score). Possible: {', '.join(sorted(_EXACT))}"
        )
    if n & (n - 1):
        raise UnsupportedModelError(
            f"num_sub_experts must be a power of two to be exported, since {n} times a stored weight is rounded; "
            "refactor with 2, 4, 8, 16, ..."
        )
    mixed = getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1
    if mixed:
        raise UnsupportedModelError(
            f"{config.model_type} with dense layers between its MoE layers is not exported: set mlp_only_layers to [] "
            "and decoder_sparse_step to 1, or serve the checkpoint elastically"
        )
    return _EXACT[config.model_type]


@torch.no_grad()
def _finer(model: PreTrainedModel, config: Any, fields: _Fields, checkpoint: ElasticCheckpoint) -> PreTrainedModel:
    n = checkpoint.elastic.num_sub_experts
    gate = checkpoint.tensors() if checkpoint.elastic.gate == "linear" else {}
    weights = model.state_dict()
    for layer in find_expert_layers(model):
        gate_up, down = _split(layer, n)
        weights[f"{layer.name}.gate_up_proj"], weights[f"{layer.name}.down_proj"] = gate_up, down
        router = f"{layer.name.rpartition('.')[0]}.{_name_of_router(model, layer)}.weight"
        own: Tensor = weights[router]
        rows = gate.get(f"{layer.name}.rows")
        weights[router] = own.repeat_interleave(n, dim=0) if rows is None else rows.flatten(0, 1).to(own.dtype)
    finer = AutoConfig.for_model(
        config.model_type,
        **{name: value for name, value in config.to_dict().items() if name not in ("model_type", CONFIG_KEY)},
    )
    setattr(finer, fields.experts, getattr(config, fields.experts) * n)
    setattr(finer, fields.neurons, getattr(config, fields.neurons) // n)
    with torch.device("meta"):
        result: PreTrainedModel = AutoModelForCausalLM.from_config(finer, dtype=model.dtype)
    result.load_state_dict(weights, assign=True)
    result.tie_weights()
    result.generation_config = model.generation_config
    return result


def _split(layer: ExpertLayer, n: int) -> tuple[Tensor, Tensor]:
    """Stacked weights ``[E n, 2C/n, H]`` and ``[E n, H, C/n]`` of a layer in the usual layout, down times n."""
    gate_up: Tensor = layer.module.gate_up_proj.detach()  # type: ignore[operator]
    down: Tensor = layer.module.down_proj.detach()  # type: ignore[operator]
    size = layer.num_neurons // n
    both = gate_up.view(layer.num_experts, 2, n, size, layer.hidden_size).transpose(1, 2)
    columns = down.view(layer.num_experts, layer.hidden_size, n, size).transpose(1, 2)
    return both.reshape(-1, 2 * size, layer.hidden_size), columns.reshape(-1, layer.hidden_size, size) * n


def _name_of_router(model: PreTrainedModel, layer: ExpertLayer) -> str:
    parent = model.get_submodule(layer.name.rpartition(".")[0])
    return next(name for name, child in parent.named_children() if child is layer.router)


def _complete_config(original: Path, written: Path, fine: Any, fields: _Fields) -> None:
    """The original's config.json with the changed fields: keys that transformers does not know stay."""
    config = json.loads(original.read_text(encoding="utf-8"))
    config.pop(CONFIG_KEY)
    for name in (fields.experts, fields.neurons, "num_experts_per_tok"):
        stored = {name, fine.attribute_map.get(name, name)} & config.keys()  # a family may know it by two names
        config |= dict.fromkeys(stored or {name}, getattr(fine, name))
    written.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

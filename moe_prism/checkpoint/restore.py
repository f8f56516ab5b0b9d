"""Give back the original model of an elastic checkpoint, bit for bit.

Reordering neurons is the only thing a refactoring does to the weights, so undoing the stored permutation
restores them exactly. Knows nothing of gates, budgets or of file layouts inside the safetensors files:
transformers maps between its stacked experts and the hub's names.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, PrismError
from .atomic import atomic_directory, check_disk_space, check_output
from .checksums import list_files, read_safetensors_header
from .read import open_checkpoint
from .schema import CARD_FILE, CONFIG_KEY, OUR_FOLDER, permutation_key


def restore_checkpoint(path: Path, out: Path) -> None:
    """Write the original model (weights, config, tokenizer) to the new directory ``out``.

    ``path`` is verified first and only read. Peak memory is the model in its stored type. Files that are neither
    weights nor ours (tokenizer, generation config, licence) are copied as they are.

    Raises:
        PrismError: ``out`` is taken, not writable or inside ``path``, or the disk is too full; before any work.
        CheckpointError: ``path`` is not a whole elastic checkpoint, or its layers or weights do not match it.
    """
    check_output(out)
    if out.expanduser().resolve().is_relative_to(path.expanduser().resolve()):
        raise PrismError(f"output {out} is inside the checkpoint {path}; name a directory outside it")
    checkpoint = open_checkpoint(path)
    weights = sorted(checkpoint.path.glob("*.safetensors"))
    check_disk_space(out, sum(file.stat().st_size for file in weights))
    permutations = checkpoint.tensors()

    from transformers import AutoModelForCausalLM

    from ..experts import find_expert_layers, invert_permutation, permute_neurons

    model = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype="auto")
    layers = {layer.name: layer for layer in find_expert_layers(model)}
    missing = sorted(set(checkpoint.elastic.layers) - set(layers))
    if missing:
        raise CheckpointError(
            f"{path}: config.json names the expert layers {', '.join(missing)}, the model has {', '.join(layers)}; "
            "load it with the transformers version it was written with (`moe-prism inspect` shows it)"
        )
    for name in checkpoint.elastic.layers:
        permute_neurons(layers[name], invert_permutation(permutations[permutation_key(name)]))

    with atomic_directory(out) as partial:
        model.save_pretrained(partial)
        _check_same_layout(weights, sorted(partial.glob("*.safetensors")))
        for name in list_files(checkpoint.path):
            if ".safetensors" not in name and name != CARD_FILE and not name.startswith(OUR_FOLDER):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint.path / name, partial / name)
        config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
        del config[CONFIG_KEY]
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _check_same_layout(before: list[Path], after: list[Path]) -> None:
    """Reordering keeps names, types and shapes; anything else means that loading has converted something."""
    old, new = _layout(before), _layout(after)
    different = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    if different:
        name = different[0]
        raise CheckpointError(
            f"the installed transformers does not load and save this model unchanged ({len(different)} tensors, first "
            f"{name!r}: {old.get(name)} became {new.get(name)}); use the version the checkpoint was written with"
        )


def _layout(files: list[Path]) -> dict[str, tuple[Any, Any]]:
    return {
        name: (entry["dtype"], entry["shape"])
        for file in files
        for name, entry in read_safetensors_header(file)[0].items()
    }

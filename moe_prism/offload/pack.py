"""Write a checkpoint's sub-experts into a block file, beside everything that stays in memory.

The output is a directory: ``blocks`` (the block file), on request ``shadow.blocks`` (the same blocks at 4 bits),
``resident.safetensors`` (all other weights under the names of the model's modules), and the checkpoint's small files.
transformers reads the checkpoint with its experts left on the disk, so memory holds the rest of the model and one
layer's experts; its copy of them in stacked form needs disk for the time of packing. Interrupted, the same call goes on
after the last block that is whole. The checkpoint is only read.
Knows nothing of caches or of running a model.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate.hooks import remove_hook_from_module
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..checkpoint.atomic import check_disk_space, check_output, sync_tree
from ..checkpoint.checksums import SUMS_FILE, format_sums, list_files, sha256
from ..checkpoint.read import ElasticCheckpoint, open_checkpoint
from ..errors import CheckpointError, PrismError
from ..experts import ExpertLayer, find_expert_layers
from ..experts.neurons import is_plain
from ..experts.shadow import GROUP, UPPER_SHARE, to_planes
from ..gates import GATES
from .block_file import DIGITS, DTYPES, BlockLayout, checksum, read_layout

BLOCKS_FILE = "blocks"
SHADOW_FILE = "shadow.blocks"
RESIDENT_FILE = "resident.safetensors"
STACKED = ("gate_up_proj", "down_proj")


def pack_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    shadow_bits: Literal[0, 4] = 0,
    verify: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> BlockLayout:
    """Pack an elastic checkpoint.

    Args:
        checkpoint: an elastic checkpoint.
        out: a new directory; ``.OUT.packing`` beside it holds what is unfinished.
        shadow_bits: 4: also write every block rounded to 4 bits, 0.28 times the bytes of bfloat16.
        verify: compare the checkpoint's files with their checksums first.
        progress: called with (blocks done, in all).

    Raises:
        PrismError: ``out`` is taken, another process is packing to it, no disk space, the gate reads
            weights (they are not in memory), the recipe makes a copy of few bits, or ``shadow_bits`` of a model whose
            experts have no such copy.
        CheckpointError: not an elastic checkpoint, or an altered one.
    """
    opened = open_checkpoint(checkpoint, verify=verify)
    if GATES.get(opened.elastic.gate).reads_weights:
        raise PrismError(
            f"gate {opened.elastic.gate!r} reads experts' weights to score them, and an offloaded model has them on "
            "disk; refactor with gate: static or gate: linear"
        )
    if opened.elastic.ladder is not None:
        raise PrismError(
            "a ladder's copy of few bits stays in memory whole; refactor with shadow_bits: 0 to offload, and let pack "
            "write a copy of the blocks (--shadow-bits 4)"
        )
    if shadow_bits not in (0, 4):
        raise PrismError(f"shadow_bits must be 0 (no copy) or 4, got {shadow_bits}")
    if shadow_bits:
        _check_shadow(opened)
    check_output(out)
    out = out.expanduser().resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_name(f".{out.name}.packing")
    with _locked(work):
        layout = _write(opened, out, work, bool(shadow_bits), progress)
        sync_tree(work)
        try:
            work.rename(out)
        except OSError as error:
            raise PrismError(f"output {out} was taken while it was being written: {error}") from None
    return layout


def _write(
    opened: ElasticCheckpoint, out: Path, work: Path, shadow: bool, progress: Callable[[int, int], None] | None
) -> BlockLayout:
    stacked = work / ".stacked"
    shutil.rmtree(stacked, ignore_errors=True)  # of a run that was killed
    size = sum(file.stat().st_size for file in opened.path.rglob("*") if file.is_file())
    check_disk_space(out, int((2 + UPPER_SHARE * shadow) * size))
    try:
        model = _load_with_experts_on_disk(opened, stacked)
        layers = find_expert_layers(model)
        layout = _layout(opened, layers)
        files = {BLOCKS_FILE: layout} | ({SHADOW_FILE: layout.model_copy(update={"dtype": DIGITS})} if shadow else {})
        for done, (name, mine) in enumerate(files.items()):
            tell = None if progress is None else partial(_tell, progress, done * layout.blocks, len(files))
            _write_blocks(work / name, mine, layers, tell)
        beside = {
            f"{layer.name}.{name}": _on_disk(layer.module, name).contiguous()
            for layer in layers
            for name, _ in layer.module.named_parameters(recurse=False)
            if name not in STACKED
        }  # biases
        remove_hook_from_module(model, recurse=True)
        resident = {k: v.contiguous() for k, v in model.state_dict().items() if v.device.type != "meta"} | beside
        _save_unshared(resident, work / RESIDENT_FILE)
    finally:
        shutil.rmtree(stacked, ignore_errors=True)
    for name in list_files(opened.path):
        if not name.endswith((".safetensors", ".safetensors.index.json")) or "/" in name:
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(opened.path / name, work / name)
    sums = {name: sha256(work / name) for name in list_files(work) if name not in (BLOCKS_FILE, SHADOW_FILE)}
    (work / SUMS_FILE).write_text(format_sums(sums), encoding="utf-8")
    return layout


def _save_unshared(tensors: dict[str, Tensor], path: Path) -> None:
    """Save without the second names of tied weights, which the model ties again."""
    seen: dict[int, str] = {}
    for name, tensor in tensors.items():
        seen.setdefault(tensor.data_ptr(), name)
    save_file({name: t for name, t in tensors.items() if seen[t.data_ptr()] == name}, path, metadata={"format": "pt"})


def _load_with_experts_on_disk(opened: ElasticCheckpoint, folder: Path) -> PreTrainedModel:
    skeleton = _skeleton(opened)
    experts = set(opened.elastic.layers)
    places: dict[str, str] = {}
    for name, module in skeleton.named_modules():
        inside = any(name.startswith(f"{layer}.") for layer in experts)
        if name in experts:
            places[name] = "disk"
        elif not inside and (next(module.parameters(recurse=False), None) is not None or not list(module.children())):
            places[name] = "cpu"
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(opened.path), dtype="auto", device_map=places, offload_folder=str(folder)
    )
    return model


def _layout(opened: ElasticCheckpoint, layers: list[ExpertLayer]) -> BlockLayout:
    names = [layer.name for layer in layers]
    if names != opened.elastic.layers:
        raise CheckpointError(
            f"the model's expert layers are {names}, the checkpoint describes {opened.elastic.layers}"
        )
    dtype = next(iter(layers[0].module.parameters())).dtype
    stored = next((name for name, known in DTYPES.items() if known == dtype and name != "float16"), None)
    if stored is None:
        raise PrismError(f"weights of {dtype} cannot be offloaded; convert the model to bfloat16 or float32 first")
    n = opened.elastic.num_sub_experts
    return BlockLayout(
        layers=names,
        num_experts=layers[0].num_experts,
        num_sub_experts=n,
        neurons=layers[0].num_neurons // n,
        hidden_size=layers[0].hidden_size,
        dtype=stored,
        interleaved=not layers[0].module.is_concatenated,
        checkpoint=sha256(opened.path / SUMS_FILE),
    )


def _check_shadow(opened: ElasticCheckpoint) -> None:
    """Raises PrismError where blocks at 4 bits could not be run."""
    if opened.elastic.scan is not None:
        raise PrismError(
            "a copy of the blocks at 4 bits is run whole, and this checkpoint skips neurons inside them; refactor with "
            "neurons: all, or pack without the copy"
        )
    layers = find_expert_layers(_skeleton(opened))
    if not all(is_plain(layer.module) for layer in layers) or layers[0].hidden_size % GROUP:
        raise PrismError(
            "only experts of the usual kind (SiLU, gate and up apart, no biases, a hidden size that is a multiple of "
            f"{GROUP}) have a copy at 4 bits; pack without it"
        )


def _skeleton(opened: ElasticCheckpoint) -> nn.Module:
    """The model without weights."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(opened.path))
    return model


def _tell(progress: Callable[[int, int], None], before: int, files: int, done: int, blocks: int) -> None:
    progress(before + done, files * blocks)


def _write_blocks(
    path: Path, layout: BlockLayout, layers: list[ExpertLayer], progress: Callable[[int, int], None] | None
) -> None:
    sums = _open_or_start(path, layout)
    with path.open("r+b") as file:
        for number, layer in enumerate(layers):
            blocks = range(number * layout.per_layer, (number + 1) * layout.per_layer)
            if not all(_is_whole(file.fileno(), layout, block, int(sums[block])) for block in blocks):
                for block, content in zip(blocks, _contents(layer, layout), strict=True):
                    file.seek(layout.offset(block))
                    file.write(content)
                    sums[block] = checksum(content)
                    file.seek(layout.table_at + 8 * block)
                    file.write(sums[block].tobytes())
                file.flush()
            if progress:
                progress(blocks.stop, layout.blocks)


def _open_or_start(path: Path, layout: BlockLayout) -> np.ndarray:
    """The table of checksums of an unfinished file of the same layout, or of a new one."""
    if path.exists():
        try:
            if read_layout(path) == layout:
                with path.open("rb") as file:
                    file.seek(layout.table_at)
                    return np.frombuffer(file.read(8 * layout.blocks), "<u8").copy()
        except CheckpointError:
            pass  # killed before its header was whole, or of another version: begin again
    with path.open("wb") as file:
        file.write(layout.header())
        file.truncate(layout.file_bytes)
    return np.zeros(layout.blocks, "<u8")


def _is_whole(descriptor: int, layout: BlockLayout, block: int, stated: int) -> bool:
    return stated != 0 and checksum(os.pread(descriptor, layout.stride, layout.offset(block))) == stated


def _contents(layer: ExpertLayer, layout: BlockLayout) -> Iterator[bytes]:
    """The blocks of a layer, in order."""
    gate_up, down = (_on_disk(layer.module, name) for name in STACKED)
    if layer.module.is_transposed:
        gate_up = gate_up.transpose(1, 2)
    else:
        down = down.transpose(1, 2)
    size = layout.neurons
    for expert in range(layout.num_experts):
        for part in range(layout.num_sub_experts):
            mine = slice(part * size, (part + 1) * size)
            if layout.interleaved:
                rows = [gate_up[expert, 2 * mine.start : 2 * mine.stop], down[expert, mine]]
            else:
                both = gate_up[expert].unflatten(0, (2, -1))
                rows = [both[0, mine], both[1, mine], down[expert, mine]]
            block = torch.cat([r.contiguous() for r in rows])
            if layout.dtype == DIGITS:
                planes = to_planes(block)
                block = torch.cat([planes.upper, planes.scale.contiguous().view(torch.uint8)], dim=1)
            yield block.view(torch.uint8).numpy().tobytes().ljust(layout.stride, b"\0")


def _on_disk(module: nn.Module, name: str) -> Tensor:
    hook = module._hf_hook
    weight: Tensor = hook.weights_map[name]  # type: ignore[union-attr,index]
    return weight


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Make the folder and hold a lock on it, so that two processes do not write one file."""
    work.mkdir(exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrismError(f"another process is packing to {work}; wait for it or name another output") from None
        yield
    finally:
        os.close(lock)

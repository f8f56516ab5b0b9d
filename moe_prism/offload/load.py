"""Load a packed checkpoint within a memory budget: everything but the routed experts, and a cache for those.

What is left of the memory goes to blocks (``room``); on an accelerator all that is resident lies there.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..checkpoint.checksums import verify_sums
from ..checkpoint.schema import CONFIG_KEY, TENSORS_FILE, ElasticConfig, parse_elastic_config
from ..elastic import attach, dial_of
from ..elastic.budgets import elastic_layers
from ..elastic.layout import use_linear_panels
from ..elastic.linear import use_fast_linear
from ..elastic.norms import use_fast_norms
from ..errors import CheckpointError, PrismError
from .accelerator import Accelerator, open_accelerator
from .block_file import BlockFile
from .eviction import EVICTION
from .executor import NAME
from .manager import READERS, Manager
from .pack import BLOCKS_FILE, RESIDENT_FILE, SHADOW_FILE, STACKED
from .parts import LayerBlocks, blocks_of
from .predict import Predictor
from .room import check_accelerator, room_for_blocks
from .tiers import DeviceTier, MemoryTier, Tier, host_blocks

RULE = "frequent-recent"
# Of the blocks' memory, for the copy at 4 bits: the best of three tried (docs/log.md).
SHADOW_SHARE = 0.75


def load_offloaded(
    path: str | Path,
    memory: int,
    *,
    dtype: str | torch.dtype = "auto",
    rule: str = RULE,
    readers: int = READERS,
    read_ahead: bool = True,
    context: int = 4096,
    shadow: float | None = None,
    device: str | Accelerator | None = None,
    verify: bool = True,
) -> PreTrainedModel:
    """Load what ``moe-prism pack`` wrote; the model generates like one from ``load_elastic``.

    Args:
        path: packed checkpoint.
        memory: bytes for the whole process: interpreter and libraries, weights, keys and values of ``context`` tokens,
            working memory, blocks. With ``device``, bytes of its memory for all of that which lies there.
        dtype: of the resident weights; "auto" keeps the stored one. Blocks stay as stored.
        rule: which block is evicted: frequent-recent, gate-aware, lfu-decay, lru.
        readers: threads that read blocks.
        read_ahead: read what the next layer will probably want.
        context: tokens that ``memory`` has room for.
        shadow: share of the blocks' memory for their copy at 4 bits, above 0 and below 1, for ``set_stored`` and
            deadlines; None: without the copy.
        device: "cuda" or "cuda:N": compute there, with all blocks in pinned memory of the host; None: on the CPU, with
            blocks on disk. It has not run on a GPU yet.
        verify: compare all files but the block file with their checksums; every block is checked when it is read.

    Raises:
        CheckpointError: not a packed checkpoint, one without the copy that ``shadow`` asks for, or an altered one.
        PrismError: the memory is too small; the message states the least that works. No such device, or one with
            ``shadow``, or a host without memory for the blocks.
    """
    if shadow is not None and not 0 < shadow < 1:
        raise PrismError(f"shadow, a share of the blocks' memory, must be above 0 and below 1, got {shadow}")
    if shadow is not None and device is not None:
        raise PrismError(f"blocks at 4 bits are for the CPU, and not for device {device}: leave out one of the two")
    accelerator = open_accelerator(device) if isinstance(device, str) else device
    folder = Path(path).expanduser()
    if not (folder / BLOCKS_FILE).is_file():
        raise CheckpointError(f"{folder} is not a packed checkpoint: run `moe-prism pack CKPT OUT` and load OUT")
    if shadow is not None and not has_shadow(folder):
        raise CheckpointError(f"{folder} has no copy at 4 bits: pack with `moe-prism pack CKPT OUT --shadow-bits 4`")
    names = [BLOCKS_FILE] if shadow is None else [BLOCKS_FILE, SHADOW_FILE]
    with ExitStack() as opened:
        files = [opened.enter_context(BlockFile(folder / name)) for name in names]
        if accelerator is not None:
            check_accelerator(files[0].layout, memory, accelerator)
        if verify:
            verify_sums(folder, besides={BLOCKS_FILE, SHADOW_FILE})
        model, elastic = load_resident(folder, dtype, None if accelerator is None else accelerator.device)
        shares = [1.0] if shadow is None else [1 - shadow, shadow]
        slots = room_for_blocks(model, memory, context, elastic.full_budget, files, shares, accelerator)
        tier: Tier
        if accelerator is None:
            tier = MemoryTier(files[0], slots[0])
        else:
            tier = DeviceTier(host_blocks(files[0], readers), files[0].layout, slots[0], accelerator)
            files[0].close()
        opened.callback(tier.close)
        manager = attach_tier(model, tier, rule=rule, readers=readers, read_ahead=read_ahead)
        opened.callback(manager.close)
        if shadow is not None:
            attach_shadow(model, manager, files[1], slots[1], rule=rule, readers=readers)
        if accelerator is None:
            use_fast_linear(model)
            use_fast_norms(model)
            use_linear_panels(model, in_place=True)  # pages of a mapped file would count beside the new ones
        opened.pop_all()  # the manager closes them from now on
    return model


def attach_blocks(
    model: PreTrainedModel,
    file: BlockFile,
    slots: int,
    *,
    rule: str = RULE,
    readers: int = READERS,
    read_ahead: bool = True,
) -> Manager:
    """Let an elastic model's experts come from a block file.

    Args:
        model: with state attached; the weights of its experts are not used.
        file: of the same checkpoint; it is closed with the manager.
        slots: blocks that are in memory at most.
        rule: name of the eviction rule.
        readers: threads that read blocks.
        read_ahead: read what the next layer will probably want.
    """
    return attach_tier(model, MemoryTier(file, slots), rule=rule, readers=readers, read_ahead=read_ahead)


def attach_tier(
    model: PreTrainedModel, tier: Tier, *, rule: str = RULE, readers: int = READERS, read_ahead: bool = True
) -> Manager:
    """Let an elastic model's experts come from a tier, which is closed with the manager; see ``attach_blocks``."""
    layers = elastic_layers(model)
    names = [layer.name for layer, _ in layers]
    if names != tier.layout.layers:
        raise CheckpointError(f"the blocks are of the layers {tier.layout.layers}, the model has {names}")
    manager = Manager(tier, EVICTION.create(rule), readers)
    per_layer = tier.layout.per_layer
    for number, (layer, _) in enumerate(layers):
        following = layers[number + 1] if read_ahead and number + 1 < len(layers) else None
        predictor = None if following is None else Predictor(*following, (number + 1) * per_layer)
        layer.module.__dict__["_moe_prism_blocks"] = LayerBlocks(manager, number * per_layer, predictor)
    dial_of(model).executor = NAME
    return manager


def attach_shadow(
    model: PreTrainedModel, stored: Manager, file: BlockFile, slots: int, *, rule: str = RULE, readers: int = READERS
) -> Manager:
    """Give a model whose blocks are attached their copy at 4 bits as well; which run from it, the limiter says.

    Args:
        model: see ``attach_blocks``.
        stored: what that returned; both count together.
        file: the copy; it is closed with the manager returned.
        slots: blocks of it that are in memory at most.
        rule: name of the eviction rule.
        readers: threads that read blocks of the copy.

    Raises:
        CheckpointError: the copy is of another checkpoint.
    """
    if file.layout.model_copy(update={"dtype": stored.layout.dtype}) != stored.layout:
        raise CheckpointError(f"{file.path} is of another checkpoint than the blocks beside it; pack again")
    manager = Manager(MemoryTier(file, slots), EVICTION.create(rule), readers, beside=stored)
    for layer, _ in elastic_layers(model):
        blocks = blocks_of(layer.module)
        assert blocks is not None  # attached before
        blocks.shadow = LayerBlocks(manager, blocks.first)
    return manager


def manager_of(model: nn.Module) -> Manager:
    """The manager of an offloaded model; raises PrismError for any other."""
    blocks = blocks_of(elastic_layers(model)[0][0].module)
    if blocks is None:
        raise PrismError("the model is in memory; load a packed checkpoint with moe_prism.offload.load_offloaded")
    return blocks.manager


def has_shadow(folder: str | Path) -> bool:
    """Whether a packed checkpoint has a copy of its blocks at 4 bits."""
    return (Path(folder).expanduser() / SHADOW_FILE).is_file()


def _copied(path: Path, dtype: str | torch.dtype, device: torch.device | None = None) -> dict[str, Tensor]:
    """Tensors in memory of their own, one after the other.

    safetensors gives views of the mapped file: pages that count as memory once they are touched, which is after the
    places for blocks were counted, and that the system may throw out.
    """
    tensors = {}
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    for name in names:
        with safe_open(path, "pt") as file:  # anew each time: the pages of the former tensor are given back
            tensor = file.get_tensor(name)
            kind = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, tensor.dtype)
            kind = kind if tensor.is_floating_point() else tensor.dtype
            tensors[name] = tensor.to(device=device, dtype=kind, copy=True)
    return tensors


def load_resident(
    folder: Path, dtype: str | torch.dtype, device: torch.device | None = None
) -> tuple[PreTrainedModel, ElasticConfig]:
    """The elastic model of a packed checkpoint without its routed experts' weights, and what it says of itself.

    Args:
        folder: of the checkpoint.
        dtype: of its weights, as of ``load_offloaded``.
        device: where all of it is to lie; None: on the CPU.
    """
    config = AutoConfig.from_pretrained(folder)
    elastic = parse_elastic_config(getattr(config, CONFIG_KEY, None))
    with init_empty_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    try:
        weights = _copied(folder / RESIDENT_FILE, dtype, device)
        tensors = _copied(folder / TENSORS_FILE, "auto")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is incomplete or altered ({error}); pack the checkpoint again") from None
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    wrong = sorted(set(left) - {f"{layer}.{name}" for layer in elastic.layers for name in STACKED})
    if wrong:
        raise CheckpointError(f"{folder / RESIDENT_FILE} has no {', '.join(wrong)}; pack the checkpoint again")
    model.eval().requires_grad_(False)
    attach(model, elastic, tensors, same_weights=False)
    if device is not None:
        _place(model, device)
    return model, elastic


def _place(model: PreTrainedModel, device: torch.device) -> None:
    """Bring to a device what did not come from the resident file, so that it counts: buffers, the gates' tensors."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    for _, state in elastic_layers(model):
        state.on(device)

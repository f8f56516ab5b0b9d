"""Load a packed checkpoint within a memory budget: everything but the routed experts, and a cache for those.

Knows how much memory the process has taken and what a cache of keys and values will; the rest goes to blocks.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import psutil
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
from .block_file import BlockFile
from .eviction import EVICTION
from .executor import NAME
from .manager import READERS, Manager
from .pack import BLOCKS_FILE, RESIDENT_FILE, SHADOW_FILE, STACKED
from .parts import LayerBlocks, blocks_of
from .predict import Predictor
from .tiers import MemoryTier, Tier

RULE = "frequent-recent"
# Of the blocks' memory, for the copy at 4 bits: the best of three tried (docs/log.md).
SHADOW_SHARE = 0.75
# Logits, outputs of a layer's pairs and what the allocator keeps, in bytes.
WORKING = 160 << 20


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
    verify: bool = True,
) -> PreTrainedModel:
    """Load what ``moe-prism pack`` wrote; the model generates like one from ``load_elastic``.

    Args:
        path: packed checkpoint.
        memory: bytes for the whole process: interpreter and libraries, weights, keys and values of ``context`` tokens,
            working memory, blocks.
        dtype: of the resident weights; "auto" keeps the stored one. Blocks stay as stored.
        rule: which block is evicted: frequent-recent, gate-aware, lfu-decay, lru.
        readers: threads that read blocks.
        read_ahead: read what the next layer will probably want.
        context: tokens that ``memory`` has room for.
        shadow: share of the blocks' memory for their copy at 4 bits, above 0 and below 1, for ``set_stored`` and
            deadlines; None: without the copy.
        verify: compare all files but the block file with their checksums; every block is checked when it is read.

    Raises:
        CheckpointError: not a packed checkpoint, one without the copy that ``shadow`` asks for, or an altered one.
        PrismError: the memory is too small; the message states the least that works.
    """
    if shadow is not None and not 0 < shadow < 1:
        raise PrismError(f"shadow, a share of the blocks' memory, must be above 0 and below 1, got {shadow}")
    folder = Path(path).expanduser()
    if not (folder / BLOCKS_FILE).is_file():
        raise CheckpointError(f"{folder} is not a packed checkpoint: run `moe-prism pack CKPT OUT` and load OUT")
    if shadow is not None and not has_shadow(folder):
        raise CheckpointError(f"{folder} has no copy at 4 bits: pack with `moe-prism pack CKPT OUT --shadow-bits 4`")
    if verify:
        verify_sums(folder, besides={BLOCKS_FILE, SHADOW_FILE})
    names = [BLOCKS_FILE] if shadow is None else [BLOCKS_FILE, SHADOW_FILE]
    with ExitStack() as opened:
        files = [opened.enter_context(BlockFile(folder / name)) for name in names]
        model, elastic = load_resident(folder, dtype)
        free = memory - psutil.Process().memory_info().rss - WORKING - context * token_bytes(model)
        shares = [1.0] if shadow is None else [1 - shadow, shadow]
        least = [elastic.full_budget * file.layout.stride for file in files]
        missing = max(need / share - free for need, share in zip(least, shares, strict=True))
        if missing > 0:
            raise PrismError(
                f"a memory of {memory / 1e9:.2f} GB is too small: with {context} tokens of context it takes "
                f"{(memory + missing) / 1e9:.2f} GB to hold the {elastic.full_budget} sub-experts of one token in one "
                "layer; raise --memory"
            )
        slots = _places(files, free, shares)
        manager = attach_blocks(model, files[0], slots[0], rule=rule, readers=readers, read_ahead=read_ahead)
        opened.callback(manager.close)
        if shadow is not None:
            attach_shadow(model, manager, files[1], slots[1], rule=rule, readers=readers)
        use_fast_linear(model)
        use_fast_norms(model)
        use_linear_panels(model, in_place=True)  # pages of a mapped file would count beside the new ones
        opened.pop_all()  # the manager closes them from now on
    return model


def _places(files: list[BlockFile], free: int, shares: list[float]) -> list[int]:
    """Places of each file's blocks; what a file does not need for all of its blocks goes to the first."""
    later = [
        min(int(share * free) // file.layout.stride, file.layout.blocks)
        for file, share in zip(files[1:], shares[1:], strict=True)
    ]
    left = free - sum(count * file.layout.stride for count, file in zip(later, files[1:], strict=True))
    return [min(left // files[0].layout.stride, files[0].layout.blocks), *later]


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


def token_bytes(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values, at most: as many heads for keys and values as the family keeps."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = max(width, getattr(config, "qk_head_dim", 0) or 0)
    return int(2 * config.num_hidden_layers * heads * width * model.dtype.itemsize)


def _copied(path: Path, dtype: str | torch.dtype) -> dict[str, Tensor]:
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
            tensors[name] = tensor.to(kind if tensor.is_floating_point() else tensor.dtype, copy=True)
    return tensors


def load_resident(folder: Path, dtype: str | torch.dtype) -> tuple[PreTrainedModel, ElasticConfig]:
    """The elastic model of a packed checkpoint without its routed experts' weights, and what it says of itself."""
    config = AutoConfig.from_pretrained(folder)
    elastic = parse_elastic_config(getattr(config, CONFIG_KEY, None))
    with init_empty_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    try:
        weights = _copied(folder / RESIDENT_FILE, dtype)
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
    return model, elastic

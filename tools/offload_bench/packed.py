"""Write a packed checkpoint of OLMoE's shape with random weights, block by block.

What ``moe-prism pack`` would write, without the checkpoint of 14 GB: rows are drawn by number of expert and
sub-expert, so that a file of whole experts (N = 1) holds the same experts as one of sub-experts. Knows nothing of
routing or time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from decode_bench.checkpoint import NUM_SUB_EXPERTS, SPREAD, elastic_config, olmoe_config
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from moe_prism.checkpoint.schema import CONFIG_KEY, TENSORS_FILE
from moe_prism.experts.shadow import to_planes
from moe_prism.offload.block_file import DIGITS, BlockLayout, checksum
from moe_prism.offload.pack import BLOCKS_FILE, RESIDENT_FILE, SHADOW_FILE


def write_packed(
    out: Path, layers: int, parts: int, importance: Tensor, seed: int, progress: Callable[[int, int], None]
) -> None:
    """Write it, whole or not at all; sub-experts have a copy at 4 bits as well.

    Args:
        out: a new directory.
        layers: L.
        parts: sub-experts of an expert in the block file.
        importance: fp32 ``[L, E, 4]``, scores of quarters of experts; whole ones have the same score.
        seed: of the weights.
        progress: called with (blocks done, in all).
    """
    work = out.with_name(f".{out.name}.writing")
    shutil.rmtree(work, ignore_errors=True)
    (work / TENSORS_FILE).parent.mkdir(parents=True)
    config = olmoe_config(layers)
    elastic = elastic_config(config, parts, seed)
    names = elastic.layers
    setattr(config, CONFIG_KEY, elastic.model_dump(mode="json"))
    config.save_pretrained(work)
    if parts != NUM_SUB_EXPERTS:
        importance = torch.ones(layers, config.num_experts, parts)
    save_file({f"{name}.importance": importance[i].contiguous() for i, name in enumerate(names)}, work / TENSORS_FILE)
    save_file(_resident(config, seed), work / RESIDENT_FILE, metadata={"format": "pt"})
    layout = BlockLayout(
        layers=names,
        num_experts=config.num_experts,
        num_sub_experts=parts,
        neurons=config.intermediate_size // parts,
        hidden_size=config.hidden_size,
        dtype="bfloat16",
        interleaved=False,
        checkpoint=f"random, seed {seed}",
    )
    files = {BLOCKS_FILE: layout}
    if parts == NUM_SUB_EXPERTS:
        files[SHADOW_FILE] = layout.model_copy(update={"dtype": DIGITS})
    with ExitStack() as stack:
        opened = {name: stack.enter_context((work / name).open("wb")) for name in files}
        sums: dict[str, list[bytes]] = {name: [] for name in files}
        for name, mine in files.items():
            opened[name].write(mine.header())
            opened[name].seek(mine.blocks_at)
        for number, rows in enumerate(_blocks(layout, config, seed)):
            for name, mine in files.items():
                block = _bytes(rows, mine)
                opened[name].write(block)
                sums[name].append(checksum(block).to_bytes(8, "little"))
            progress(number + 1, layout.blocks)
        for name, mine in files.items():
            opened[name].seek(mine.table_at)
            opened[name].write(b"".join(sums[name]))
    work.rename(out)


def _bytes(rows: Tensor, layout: BlockLayout) -> bytes:
    if layout.dtype == DIGITS:
        planes = to_planes(rows)
        rows = torch.cat([planes.upper, planes.scale.contiguous().view(torch.uint8)], dim=1)
    return rows.view(torch.uint8).numpy().tobytes().ljust(layout.stride, b"\0")


def _blocks(layout: BlockLayout, config: PreTrainedConfig, seed: int) -> Iterator[Tensor]:
    quarters, size = NUM_SUB_EXPERTS // layout.num_sub_experts, config.intermediate_size // NUM_SUB_EXPERTS
    spread = torch.tensor([SPREAD["gate_proj"], SPREAD["up_proj"], SPREAD["down_proj"] * 2**0.5])
    spread = (spread / config.hidden_size**0.5)[:, None, None]
    for block in range(layout.blocks):
        kinds: list[Tensor] = []
        for quarter in range(block * quarters, (block + 1) * quarters):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + quarter)
            kinds.append((torch.randn(3, size, config.hidden_size, generator=generator) * spread).bfloat16())
        yield torch.cat(kinds, dim=1).flatten(0, 1)  # gate, up and down of all neurons of the block


def _resident(config: PreTrainedConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = config.hidden_size

    def drawn(rows: int, spread: float) -> Tensor:
        return (torch.randn(rows, hidden, generator=generator) * (spread / hidden**0.5)).bfloat16()

    weights = {
        "model.embed_tokens.weight": drawn(config.vocab_size, hidden**0.5),
        "lm_head.weight": drawn(config.vocab_size, 1.0),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
    }
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        weights[f"{prefix}.mlp.gate.weight"] = drawn(config.num_experts, SPREAD["mlp.gate."])
        weights |= {f"{prefix}.self_attn.{name}_proj.weight": drawn(hidden, 1.0) for name in "qkvo"}
        norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
        weights |= {f"{prefix}.{name}.weight": torch.ones(hidden).bfloat16() for name in norms}
    return weights

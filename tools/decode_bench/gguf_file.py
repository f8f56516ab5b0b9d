"""Write the model of the bench as a GGUF file for llama.cpp: same weights, bfloat16, norms in fp32.

    LLAMA_PYTHON -m decode_bench.gguf_file CHECKPOINT FILE.gguf

Runs under llama.cpp's Python, which has NumPy and the gguf package but no torch. OLMoE only. The file has no
vocabulary: the bench feeds token numbers. Knows nothing of time.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARCHITECTURE = "olmoe"
# Name on the hub -> name in the file; the layer's number goes in the place of "{}".
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.{}.input_layernorm": "blk.{}.attn_norm",
    "model.layers.{}.self_attn.q_proj": "blk.{}.attn_q",
    "model.layers.{}.self_attn.k_proj": "blk.{}.attn_k",
    "model.layers.{}.self_attn.v_proj": "blk.{}.attn_v",
    "model.layers.{}.self_attn.o_proj": "blk.{}.attn_output",
    "model.layers.{}.self_attn.q_norm": "blk.{}.attn_q_norm",
    "model.layers.{}.self_attn.k_norm": "blk.{}.attn_k_norm",
    "model.layers.{}.post_attention_layernorm": "blk.{}.ffn_norm",
    "model.layers.{}.mlp.gate": "blk.{}.ffn_gate_inp",
    "model.layers.{}.mlp.experts.*.gate_proj": "blk.{}.ffn_gate_exps",
    "model.layers.{}.mlp.experts.*.up_proj": "blk.{}.ffn_up_exps",
    "model.layers.{}.mlp.experts.*.down_proj": "blk.{}.ffn_down_exps",
}
# llama.cpp multiplies norms in fp32, and its own converter keeps routers in fp32.
WIDE = ("_norm", "ffn_gate_inp")


def gguf_name(name: str) -> tuple[str, int | None]:
    """Name in the file, without ".weight", and the expert's number for weights that are stacked there.

    Raises:
        KeyError: no weight of OLMoE.
    """
    plain = name.removesuffix(".weight")
    expert = re.search(r"\.experts\.(\d+)\.", plain)
    layer = re.search(r"\.layers\.(\d+)\.", plain)
    pattern = re.sub(r"\.experts\.\d+\.", ".experts.*.", re.sub(r"\.layers\.\d+\.", ".layers.{}.", plain))
    target = NAMES[pattern].format(layer.group(1) if layer else "")
    return target, int(expert.group(1)) if expert else None


def bf16_tensors(folder: Path) -> dict[str, NDArray[np.uint16]]:
    """All weights of a checkpoint as bit patterns, mapped from its safetensors files."""
    found: dict[str, NDArray[np.uint16]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= bf16_file(file)
    return found


def bf16_file(file: Path) -> dict[str, NDArray[np.uint16]]:
    """The same of one file."""
    found: dict[str, NDArray[np.uint16]] = {}
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise SystemExit(f"error: {file}: {name} is {entry['dtype']}, the bench writes BF16 only")
        shape, at = tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
        found[name] = np.memmap(file, np.uint16, "r", at, shape)
    return found


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 patterns as fp32 values, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def stacked(weights: dict[str, NDArray[np.uint16]]) -> Iterator[tuple[str, list[NDArray[np.uint16]]]]:
    """Every tensor of the file: its name, and the pieces that are stacked to it (one for plain tensors)."""
    groups: dict[str, dict[int | None, NDArray[np.uint16]]] = {}
    for name, value in weights.items():
        target, expert = gguf_name(name)
        groups.setdefault(target, {})[expert] = value
    for target, pieces in groups.items():
        yield target, [pieces[number] for number in sorted(pieces, key=lambda n: -1 if n is None else n)]


def write_gguf(folder: Path, out: Path) -> None:
    """Write the file of a checkpoint."""
    write_weights(json.loads((folder / "config.json").read_text()), bf16_tensors(folder), out)


def write_weights(config: dict[str, Any], weights: dict[str, NDArray[np.uint16]], out: Path) -> None:
    """Write the file under a temporary name, then rename it.

    Args:
        config: of the checkpoint.
        weights: by their names on the hub, as bit patterns; mapped, they need not fit memory.
        out: the file.
    """
    import gguf

    draft = out.with_name(out.name + ".partial")
    writer = gguf.GGUFWriter(draft, ARCHITECTURE)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_tokenizer_model("no_vocab")
    tensors = list(stacked(weights))
    for name, pieces in tensors:
        wide = name.endswith(WIDE)
        shape = pieces[0].shape if len(pieces) == 1 else (len(pieces), *pieces[0].shape)
        values, itemsize = int(np.prod(shape)), 4 if wide else 2
        kind = gguf.GGMLQuantizationType.F32 if wide else gguf.GGMLQuantizationType.BF16
        writer.add_tensor_info(f"{name}.weight", shape, np.dtype(np.float32), values * itemsize, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, pieces in tensors:  # one tensor in memory at a time
        whole = np.ascontiguousarray(pieces[0] if len(pieces) == 1 else np.stack(pieces))
        writer.write_tensor_data(widened(whole) if name.endswith(WIDE) else whole)
    writer.close()
    draft.rename(out)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))

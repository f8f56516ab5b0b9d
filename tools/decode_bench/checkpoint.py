"""Write an elastic checkpoint of OLMoE's shape with random weights, layer by layer.

Neurons of random experts have no order worth finding, so there is no calibration: the permutation is the
identity and the static gate's importances are drawn. Knows nothing of time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

from moe_prism import Recipe
from moe_prism.checkpoint.atomic import check_disk_space
from moe_prism.checkpoint.card import model_card
from moe_prism.checkpoint.schema import Calibration, ElasticConfig, permutation_key
from moe_prism.checkpoint.write import write_checkpoint
from moe_prism.elastic.fingerprint import fingerprint
from moe_prism.elastic.model import FINGERPRINT
from moe_prism.evaluation.environment import versions

NUM_SUB_EXPERTS = 4
SHAPE = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 4096,
}
# Standard deviations in units of 1 / sqrt(inputs). Routing must be clear and the experts' share of the hidden
# state large, or wrong experts would hardly show in the logits.
SPREAD = {"mlp.gate.": 2.5, "gate_proj": 1.5, "up_proj": 1.5, "down_proj": 3.0}


def olmoe_config(layers: int, **changes: int) -> PreTrainedConfig:
    """OLMoE-1B-7B with some number of layers; ``changes``: other sizes than OLMoE's."""
    return AutoConfig.for_model(
        "olmoe",
        num_hidden_layers=layers,
        norm_topk_prob=False,
        tie_word_embeddings=False,
        architectures=["OlmoeForCausalLM"],
        dtype="bfloat16",
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        **SHAPE | changes,
    )


def elastic_config(config: PreTrainedConfig, parts: int, seed: int) -> ElasticConfig:
    """What the checkpoint says of itself with ``parts`` sub-experts an expert: a static gate, nothing was solved."""
    return ElasticConfig(
        num_sub_experts=parts,
        num_experts=config.num_experts,
        num_neurons=config.intermediate_size,
        top_k=config.num_experts_per_tok,
        full_budget=config.num_experts_per_tok * parts,
        gate="static",
        solver="none",
        seed=seed,
        layers=[experts_name(layer) for layer in range(config.num_hidden_layers)],
        calibration=Calibration(text="none", tokens=0),
        weights_dtype="bfloat16",
        created_with=versions(),
    )


def write_model(out: Path, layers: int, seed: int, **changes: int) -> None:
    """Write the checkpoint, whole or not at all.

    Args:
        out: a new directory.
        layers: number of layers; one takes 0.84 GB, the rest 0.41 GB.
        seed: of weights and importances.
        changes: other sizes than OLMoE's, for tests.
    """
    config = olmoe_config(layers, **changes)
    recipe = Recipe(num_sub_experts=NUM_SUB_EXPERTS, gate="static", calibration_tokens=512)
    elastic = elastic_config(config, NUM_SUB_EXPERTS, seed)
    check_disk_space(out, _bytes(config))
    shards, tensors = out.with_name(out.name + ".weights"), _gate_tensors(config, seed)
    shards.mkdir(parents=True, exist_ok=True)
    # Shards first: the fingerprints, which write_checkpoint wants, are taken of the weights.
    index: dict[str, str] = {}
    for number, shard in enumerate(_shards(config, seed)):
        file = f"model-{number:05d}.safetensors"
        save_file(shard, shards / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
        if number < layers:
            tensors[f"{experts_name(number)}.{FINGERPRINT}"] = _fingerprint(shard, number)

    def save(folder: Path) -> None:
        config.save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        for file in sorted(shards.iterdir()):
            file.rename(folder / file.name)
        shards.rmdir()
        whole = {"metadata": {"total_size": _bytes(config)}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(whole, indent=1))

    write_checkpoint(
        out,
        save_model=save,
        elastic=elastic,
        tensors=tensors,
        recipe_yaml=recipe.to_yaml(),
        card=model_card(name=out.name, elastic=elastic, recipe_yaml=recipe.to_yaml()),
    )


def experts_name(layer: int) -> str:
    """Of the module."""
    return f"model.layers.{layer}.mlp.experts"


def _shards(config: PreTrainedConfig, seed: int) -> Iterator[dict[str, Tensor]]:
    """Weights by name as on the hub: one dictionary for each layer, then the rest."""
    hidden, neurons, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    for layer in range(config.num_hidden_layers):
        shapes: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_norm": (hidden,),
            "self_attn.k_norm": (hidden,),
            "mlp.gate": (config.num_experts, hidden),
        }
        shapes |= {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        for expert in range(config.num_experts):
            shapes |= {f"mlp.experts.{expert}.{name}_proj": (neurons, hidden) for name in ("gate", "up")}
            shapes[f"mlp.experts.{expert}.down_proj"] = (hidden, neurons)
        yield _drawn({f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}, seed, layer)
    rest = {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    weights = _drawn(rest, seed, config.num_hidden_layers)
    generator = torch.Generator().manual_seed(seed)
    weights["model.embed_tokens.weight"] = torch.randn(vocabulary, hidden, generator=generator).bfloat16()
    yield weights


def _drawn(shapes: dict[str, tuple[int, ...]], seed: int, number: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed * 1000 + number + 1)
    weights = {}
    for name, shape in shapes.items():
        if len(shape) == 1:  # norms: not all one, so that a forgotten or swapped one is seen
            weights[name] = (0.5 + torch.rand(shape, generator=generator)).bfloat16()
        else:
            spread = next((value for part, value in SPREAD.items() if part in name), 1.0)
            weights[name] = (torch.randn(shape, generator=generator) * (spread / shape[1] ** 0.5)).bfloat16()
    return weights


def _gate_tensors(config: PreTrainedConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    experts, neurons = config.num_experts, config.intermediate_size
    tensors = {}
    for layer in range(config.num_hidden_layers):
        name = experts_name(layer)
        tensors[permutation_key(name)] = torch.arange(neurons, dtype=torch.int32).repeat(experts, 1)
        tensors[f"{name}.importance"] = torch.rand(experts, NUM_SUB_EXPERTS, generator=generator)
    return tensors


def _fingerprint(shard: dict[str, Tensor], layer: int) -> Tensor:
    names = [name for name in shard if name.endswith("down_proj.weight")]  # in the order of the experts
    module = nn.Module()
    module.down_proj = nn.Parameter(torch.stack([shard[name] for name in names]), requires_grad=False)
    return fingerprint(module)


def _bytes(config: PreTrainedConfig) -> int:
    hidden, experts = config.hidden_size, config.num_experts
    layer = 4 * hidden * hidden + 3 * experts * hidden * config.intermediate_size + experts * hidden + 4 * hidden
    total: int = 2 * (config.num_hidden_layers * layer + 2 * config.vocab_size * hidden + hidden)
    return total


def _tokenizer() -> PreTrainedTokenizerFast:
    """Single bytes and an end: some engines refuse a model without a tokenizer."""
    vocabulary = {"<end>": 0, "<pad>": 1}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")

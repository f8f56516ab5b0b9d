"""The view of a dense model as one expert per layer against the dense model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from making import recipe
from tiny import tokens
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moe_prism import budget, load_elastic, make_elastic
from moe_prism.errors import UnsupportedModelError
from moe_prism.experts import DENSE, dense_as_experts, find_expert_layers

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied, long rope, other eps": (
        "llama",
        {
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
        },
    ),
    "llama, own head size": ("llama", {"head_dim": 12}),
    "mistral, sliding window": ("mistral", {"sliding_window": 4}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3, biased attention": ("qwen3", {"head_dim": 8, "attention_bias": True}),
}


def dense_model(family: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**SIZES, **changes}), dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.dim() == 1), std=0.3)
    return model


def test_every_dense_family_is_tested() -> None:
    assert {family for family, _ in VARIANTS.values()} == set(DENSE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_view_computes_what_the_dense_model_does(variant: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[variant]
    model = dense_model(family, **changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    view = dense_as_experts(model)
    ids = tokens()
    with torch.no_grad():
        expected = model(ids).logits
        assert (view(ids).logits - expected).abs().max() <= 1e-4
    assert expected.std() > 0.1
    layers = find_expert_layers(view)
    assert [(x.num_experts, x.num_neurons, x.top_k) for x in layers] == [(1, 48, 1)] * 2
    view.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert (again(ids).logits - expected).abs().max() <= 1e-4
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    "how",
    [
        {"solver": "balanced", "gate": "proxy", "gate_options": {"gate_neurons": 1}},
        {"solver": "importance", "neurons": "gate-first", "compensation_budgets": 3},
    ],
)
def test_a_refactored_view_is_the_dense_model_at_full_budget_only(how: dict[str, Any], tmp_path: Path) -> None:
    model = dense_model("llama")
    dense_as_experts(model).save_pretrained(tmp_path / "view")
    make_elastic(tmp_path / "view", tmp_path / "elastic", recipe(num_sub_experts=16, **how))
    elastic = load_elastic(tmp_path / "elastic", dtype="float32")
    ids = tokens()
    with torch.no_grad():
        expected = model(ids).logits
        assert (elastic(ids).logits - expected).abs().max() <= 1e-4
        errors = []
        for k in (1, 8, 15):
            with budget(elastic, k):
                errors.append(float((elastic(ids).logits - expected).square().mean()))
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {}, r"gpt2 cannot be viewed as experts; possible dense families: llama"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act must be silu for the view as experts, got gelu"),
        ("llama", {"mlp_bias": True}, "llama with mlp_bias has no counterpart in mixtral"),
        ("llama", {"attention_bias": True}, "llama with attention_bias has no counterpart in mixtral"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "sliding attention in some layers only",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused(family: str, changes: dict[str, Any], message: str) -> None:
    sizes = {} if family == "gpt2" else SIZES
    config = AutoConfig.for_model(family, **{**sizes, **changes})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=message):
        dense_as_experts(model)

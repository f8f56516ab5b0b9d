from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, tiny_model, tokens
from transformers import AutoConfig, AutoModelForCausalLM

from moe_prism.errors import PrismError, UnsupportedModelError
from moe_prism.experts import SUPPORTED, down_norms, find_expert_layers, invert_permutation, permute_neurons
from moe_prism.experts.neurons import activations, down, down_bias


def test_every_supported_family_is_tested() -> None:
    assert set(FAMILIES) == set(SUPPORTED)


def random_permutation(experts: int, neurons: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(neurons, generator=generator) for _ in range(experts)])


@pytest.mark.parametrize("family", FAMILIES)
def test_permuting_neurons_keeps_the_function_and_can_be_undone(family: str, tmp_path) -> None:
    model = tiny_model(family)
    ids = tokens()
    with torch.no_grad():
        before = model(ids).logits
    original = {name: value.clone() for name, value in model.state_dict().items()}
    layers = find_expert_layers(model)
    assert len(layers) == 2
    orders = [random_permutation(x.num_experts, x.num_neurons, i) for i, x in enumerate(layers)]
    for layer, order in zip(layers, orders, strict=True):
        permute_neurons(layer, order)
    with torch.no_grad():
        after = model(ids).logits
    assert not all(torch.equal(v, original[n]) for n, v in model.state_dict().items())
    assert (after - before).abs().max() <= 1e-4
    assert torch.equal(after.argmax(-1), before.argmax(-1))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert (again(ids).logits - before).abs().max() <= 1e-4
    for layer, order in zip(find_expert_layers(again), orders, strict=True):
        permute_neurons(layer, invert_permutation(order))
    for name, value in again.state_dict().items():
        assert torch.equal(value, original[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expert_is_the_sum_of_its_neurons(family: str) -> None:
    """Each layer's output rebuilt neuron run by neuron run equals the family's own forward."""
    model = tiny_model(family)
    layer = find_expert_layers(model)[0]
    x = torch.randn(5, layer.hidden_size)
    index = torch.stack([torch.randperm(layer.num_experts)[: layer.top_k] for _ in range(5)])
    weight = torch.rand(5, layer.top_k)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        expected = layer.module(x, index, weight)
        mine = torch.zeros_like(expected)
        for t in range(5):
            for slot in range(layer.top_k):
                e = int(index[t, slot])
                for start in range(0, layer.num_neurons, 4):
                    run = slice(start, start + 4)
                    part = activations(layer.module, e, x[t : t + 1], run) @ down(layer.module, e, run)
                    mine[t] += weight[t, slot] * part[0]
                bias = down_bias(layer.module)
                if bias is not None:
                    mine[t] += weight[t, slot] * bias[e]
    torch.testing.assert_close(mine, expected, atol=1e-4, rtol=1e-4)


def test_down_norms_match_the_columns() -> None:
    for family in ("olmoe", "gpt_oss"):
        layer = find_expert_layers(tiny_model(family))[0]
        norms = down_norms(layer)
        assert norms.shape == (layer.num_experts, layer.num_neurons)
        assert norms[1, 3].item() == pytest.approx(down(layer.module, 1, slice(3, 4)).norm().item(), rel=1e-5)


def test_a_dense_model_is_refused_by_name() -> None:
    config = AutoConfig.for_model("llama", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    with pytest.raises(UnsupportedModelError, match=r"llama.*Supported families: olmoe.*dense_as_experts"):
        find_expert_layers(AutoModelForCausalLM.from_config(config))


def test_routed_experts_behind_another_interface_are_refused_by_name() -> None:
    config = AutoConfig.for_model(
        "jetmoe", hidden_size=16, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8, intermediate_size=16
    )
    config.vocab_size = 32
    with pytest.raises(UnsupportedModelError, match=r"jetmoe.*Not reachable that way: dbrx, jetmoe"):
        find_expert_layers(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(3, 4), "shape"),
        (torch.zeros(8, 16, dtype=torch.long), "once"),
    ],
)
def test_a_table_that_is_no_permutation_changes_nothing(bad: torch.Tensor, message: str) -> None:
    model = tiny_model("olmoe")
    layer = find_expert_layers(model)[0]
    before = layer.module.down_proj.detach().clone()
    with pytest.raises(PrismError, match=message):
        permute_neurons(layer, bad)
    assert torch.equal(layer.module.down_proj, before)

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from making import elastic_model, logits, recipe, save_stock
from tiny import FAMILIES, tiny_model, tokens
from transformers import AutoConfig, AutoModelForCausalLM

import moe_prism
from moe_prism.elastic.layer import state_of
from moe_prism.elastic.selection import best, first_candidates, pooled_scores
from moe_prism.errors import CheckpointError, PrismError, UnsupportedModelError
from moe_prism.experts import find_expert_layers
from moe_prism.experts.neurons import activations, down, down_bias

GATE_OPTIONS = {"proxy": {"gate_neurons": 2}, "linear": {}, "static": {}}


@pytest.mark.parametrize("gate", GATE_OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_budget_equals_the_original(family: str, gate: str, tmp_path) -> None:
    original = logits(tiny_model(family))
    model = elastic_model(family, tmp_path, gate=gate, gate_options=GATE_OPTIONS[gate])
    full = moe_prism.full_budget(model)
    assert full == 4 * find_expert_layers(model)[0].top_k
    assert (logits(model) - original).abs().max() <= 1e-4
    assert torch.equal(logits(model).argmax(-1), original.argmax(-1))
    # one below full runs the gate and the executor: close to the original, but not the same
    with moe_prism.budget(model, full - 1):
        near = logits(model)
    assert not torch.equal(near, logits(model))


@pytest.mark.parametrize("gate", GATE_OPTIONS)
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "gpt_oss"])
def test_a_layer_at_a_budget_is_the_weighted_sum_of_the_chosen_neurons(family: str, gate: str, tmp_path) -> None:
    """An oracle that masks neurons of whole experts, token by token, knows no ragged list."""
    model = elastic_model(family, tmp_path, gate=gate, gate_options=GATE_OPTIONS[gate])
    layer = find_expert_layers(model)[1]
    state = state_of(layer.module)
    x = torch.randn(9, layer.hidden_size)
    index = torch.stack([torch.randperm(layer.num_experts)[: layer.top_k] for _ in range(9)])
    weight = torch.rand(9, layer.top_k)
    for k_active in (1, 3, 4 * layer.top_k - 1):
        with torch.no_grad(), moe_prism.budget(model, k_active):
            found = layer.module(x, index, weight)
            scores = state.gate.score(layer.module, state.tensors, x, index, 4).values
            pooled = pooled_scores(scores, weight, True)
            chosen = best(pooled, first_candidates(pooled, weight), torch.full((9,), k_active))
            expected = torch.zeros_like(x)
            for t in range(9):
                for slot in range(layer.top_k):
                    e = int(index[t, slot])
                    mask = chosen[t, slot].repeat_interleave(layer.num_neurons // 4).float()
                    hidden = activations(layer.module, e, x[t : t + 1])[0] * mask
                    expected[t] += weight[t, slot] * (hidden @ down(layer.module, e, slice(None)))
                    if (bias := down_bias(layer.module)) is not None:
                        expected[t] += weight[t, slot] * bias[e]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_fewer_routed_experts_equal_a_model_configured_that_way(family: str, tmp_path) -> None:
    model = tiny_model(family)
    top_k = find_expert_layers(model)[0].top_k
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.num_experts_per_tok = top_k - 1
    fewer = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, dtype=torch.float32)
    with moe_prism.routed_experts(model, top_k - 1):
        torch.testing.assert_close(logits(model), logits(fewer), atol=1e-5, rtol=1e-5)
    assert find_expert_layers(model)[0].top_k == top_k


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_the_linear_gate_gives_the_original_with_fewer_experts_at_multiples_of_n(family: str, tmp_path) -> None:
    model = elastic_model(family, tmp_path, gate="linear")
    renormalises = family == "mixtral"
    for k in range(1, find_expert_layers(model)[0].top_k):
        with moe_prism.budget(model, 4 * k):
            found = logits(model)
        with moe_prism.routed_experts(model, k):
            expected = logits(model)
        if renormalises:  # the family's own router would scale the rest up; the choice is the same, not the sum
            assert not torch.allclose(found, expected, atol=1e-3)
        else:
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_phimoe_baselines_are_refused_clearly() -> None:
    with pytest.raises(UnsupportedModelError, match="phimoe"), moe_prism.routed_experts(tiny_model("phimoe"), 1):
        pass


def test_budgets_are_checked_and_put_back(tmp_path) -> None:
    model = elastic_model("olmoe", tmp_path)
    for bad in (0, 17, -1, True, None, [4, 17], torch.tensor([0])):
        with pytest.raises(PrismError, match="from 1 to 16"):
            moe_prism.set_budget(model, bad)
    for bad, message in ((2.5, "share must be in"), ("8", "no operating point '8'"), ([], "empty list")):
        with pytest.raises(PrismError, match=message):
            moe_prism.set_budget(model, bad)
    for bad in ({"k_min": 17}, {"cap": 4}, {"k_min": 2, "cap": 0}):
        with pytest.raises(PrismError):
            moe_prism.set_budget(model, 4, **bad)
    moe_prism.set_budget(model, 5)

    def fails() -> None:
        with moe_prism.budget(model, 3):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert state_of(find_expert_layers(model)[0].module).dial.k_active == 5


def test_a_stock_model_has_no_budget() -> None:
    with pytest.raises(PrismError, match="is not elastic"):
        moe_prism.set_budget(tiny_model("olmoe"), 4)


def test_cost_shares_by_hand(tmp_path) -> None:
    proxy = elastic_model("olmoe", tmp_path, gate="proxy", gate_options={"gate_neurons": 2})
    # k = 4 experts of 16 neurons of 3 H weights; 8 of 16 sub-experts of 4 neurons; 8 idle ones with 2 neurons of 2 H
    assert moe_prism.cost_shares(proxy, 8).flops == pytest.approx((8 * 4 * 3 + 8 * 2 * 2) / (4 * 16 * 3))
    assert moe_prism.cost_shares(proxy, 16) == (1.0, 1.0)
    static = elastic_model("olmoe", tmp_path, gate="static")
    assert moe_prism.cost_shares(static, 8) == (0.5, 0.5)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_plain_from_pretrained_gives_the_original_and_with_our_name_the_elastic_model(family: str, tmp_path) -> None:
    stock = save_stock(tmp_path / "stock", family)
    out = tmp_path / "elastic"
    moe_prism.make_elastic(stock, out, recipe())
    original = logits(AutoModelForCausalLM.from_pretrained(stock, dtype=torch.float32))
    plain = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert (logits(plain) - original).abs().max() <= 1e-4
    # linear layers and norms by their own kernels add up in another order
    explicit = moe_prism.load_elastic(out, dtype=torch.float32, fast_linear=False)
    lazy = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, experts_implementation="moe_prism").eval()
    assert (logits(lazy) - original).abs().max() <= 1e-4
    moe_prism.set_budget(lazy, 3)
    moe_prism.set_budget(explicit, 3)
    assert torch.equal(logits(lazy), logits(explicit))
    assert not torch.allclose(logits(lazy), original, atol=1e-3)
    ids = tokens(1, 4)
    lazy.generate(ids, max_new_tokens=3, do_sample=False)
    lazy.save_pretrained(tmp_path / "again")  # what we attached must not be in the way


def test_importing_moe_prism_is_enough_and_light(tmp_path) -> None:
    out = tmp_path / "elastic"
    moe_prism.make_elastic(save_stock(tmp_path / "stock"), out, recipe())
    script = f"""
import sys, moe_prism
assert "torch" not in sys.modules and "transformers" not in sys.modules
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(out)!r}, experts_implementation="moe_prism")
ids = torch.arange(3, 9)[None]
full = model(ids).logits
moe_prism.set_budget(model, 1)
assert not torch.allclose(model(ids).logits, full, atol=1e-3)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_altered_weights_are_noticed(tmp_path) -> None:
    out = tmp_path / "elastic"
    moe_prism.make_elastic(save_stock(tmp_path / "stock"), out, recipe())
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, experts_implementation="moe_prism")
    with torch.no_grad():
        find_expert_layers(model)[1].module.down_proj.add_(1)
    with pytest.raises(CheckpointError, match="match no layer"):
        logits(model)


def test_our_experts_function_on_a_stock_checkpoint(tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        save_stock(tmp_path / "stock"), dtype=torch.float32, experts_implementation="moe_prism"
    )
    with pytest.raises(CheckpointError, match="stock model"):
        logits(model)


def test_no_token_and_one_expert_for_all(tmp_path) -> None:
    model = elastic_model("olmoe", tmp_path, gate="proxy", gate_options={"gate_neurons": 2})
    module = find_expert_layers(model)[0].module
    with torch.no_grad(), moe_prism.budget(model, 5):
        assert module(torch.zeros(0, 32), torch.zeros(0, 4).long(), torch.zeros(0, 4)).shape == (0, 32)
        x = torch.randn(6, 32)
        same = torch.tensor([[0, 1, 2, 3]]).expand(6, 4)
        weight = torch.rand(6, 4)
        together = module(x, same, weight)
        alone = torch.cat([module(x[t : t + 1], same[t : t + 1], weight[t : t + 1]) for t in range(6)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)

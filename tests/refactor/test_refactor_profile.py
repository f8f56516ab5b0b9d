from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model, tokens

from moe_prism.errors import PrismError
from moe_prism.experts import find_expert_layers
from moe_prism.experts.neurons import gate_up
from moe_prism.refactor.capture import capture, capture_bytes, read_layer
from moe_prism.refactor.profile import profile_expert, sample


def received(model, windows, folder):
    layers = find_expert_layers(model)
    capture(model, layers, windows, folder)
    return layers


def test_profiles_are_the_activations_of_the_routed_tokens(tmp_path) -> None:
    """SiLU(x W_gate) * (x W_up) written out, on inputs caught by an independent hook."""
    model = tiny_model("olmoe")
    windows = tokens(6, 32)
    caught = []
    layers = find_expert_layers(model)
    handle = layers[1].module.register_forward_pre_hook(lambda m, a: caught.append(a))
    received(model, windows, tmp_path)
    handle.remove()
    x = torch.cat([c[0] for c in caught])
    index = torch.cat([c[1] for c in caught])
    weight = torch.cat([c[2] for c in caught])
    inputs = read_layer(tmp_path, layers[1])
    for e in range(8):
        profile = profile_expert(layers[1], inputs, e, limit=10_000, minimum=1, seed=(0, 1, e))
        where = (index == e).nonzero()
        rows = x[where[:, 0]]
        gate, up = gate_up(layers[1].module, e, slice(None)).detach().chunk(2)
        expected = torch.nn.functional.silu(rows @ gate.t()) * (rows @ up.t())
        torch.testing.assert_close(profile.activations, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(profile.routing_weights, weight[where[:, 0], where[:, 1]])
        assert profile.routed_tokens == len(where)
        assert not profile.is_fallback


def test_the_cap_is_kept_and_an_unreached_expert_falls_back(tmp_path) -> None:
    model = tiny_model("olmoe")
    with torch.no_grad():
        find_expert_layers(model)[0].router.weight[3] = 0  # never among the best
    layers = received(model, tokens(6, 32), tmp_path)
    inputs = read_layer(tmp_path, layers[0])
    counts = torch.bincount(inputs.experts.flatten(), minlength=8)
    rare = int(counts.argmin())
    profile = profile_expert(layers[0], inputs, rare, limit=20, minimum=int(counts[rare]) + 1, seed=(0,))
    assert profile.is_fallback
    assert profile.routed_tokens == counts[rare]
    assert profile.activations.shape == (20, 16)
    often = profile_expert(layers[0], inputs, int(counts.argmax()), limit=7, minimum=1, seed=(0,))
    assert often.activations.shape[0] == 7
    assert not often.is_fallback


@given(st.integers(0, 300), st.integers(1, 100), st.integers(0, 10))
@settings(deadline=None, max_examples=60)
def test_a_sample_is_a_sorted_subset_of_the_asked_size(count: int, limit: int, seed: int) -> None:
    found = sample(count, limit, (seed,))
    assert len(found) == min(count, limit)
    assert len(set(found.tolist())) == len(found)
    assert torch.equal(found, found.sort().values)
    assert torch.equal(found, sample(count, limit, (seed,)))


def test_samples_are_uniform() -> None:
    hits = np.zeros(20)
    for seed in range(2000):
        hits[sample(20, 5, (seed,)).numpy()] += 1
    assert abs(hits - 500).max() < 120  # six standard deviations of a binomial with p = 1/4


def test_an_interrupted_capture_continues_to_the_same_result(tmp_path) -> None:
    model = tiny_model("olmoe")
    windows = tokens(200, 32)  # 64 windows a batch
    layers = find_expert_layers(model)
    seen = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(model, layers, windows, tmp_path / "a", stop)
    first = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert first == ["batch-0000.safetensors", "batch-0001.safetensors"]
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "a").iterdir()}
    capture(model, layers, windows, tmp_path / "a")
    capture(model, layers, windows, tmp_path / "b")
    for layer in layers:
        for mine, whole in zip(read_layer(tmp_path / "a", layer), read_layer(tmp_path / "b", layer), strict=True):
            assert torch.equal(mine, whole)
    assert all((tmp_path / "a" / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())
    assert not layers[0].module._forward_pre_hooks


def test_the_disk_estimate_covers_what_is_written(tmp_path) -> None:
    model = tiny_model("olmoe")
    windows = tokens(200, 32)
    layers = received(model, windows, tmp_path)
    written = sum(p.stat().st_size for p in tmp_path.iterdir())
    estimate = capture_bytes(layers, windows.numel(), 4)
    assert estimate <= written <= 1.05 * estimate + 10_000


def test_hidden_states_that_are_not_finite_name_the_layer(tmp_path) -> None:
    model = tiny_model("olmoe")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[0, 0] = torch.nan
    with pytest.raises(PrismError, match=r"model\.layers\.0\.mlp\.experts: .*not finite"):
        received(model, tokens(), tmp_path)


def test_activations_that_are_not_finite_name_layer_and_expert(tmp_path) -> None:
    model = tiny_model("olmoe")
    layers = received(model, tokens(6, 32), tmp_path)
    with torch.no_grad():
        layers[1].module.gate_up_proj[2, 0, 0] = torch.inf
    with pytest.raises(PrismError, match=r"layers\.1.*expert 2: activations are not finite"):
        profile_expert(layers[1], read_layer(tmp_path, layers[1]), 2, 1000, 1, (0,))

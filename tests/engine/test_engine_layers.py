"""Steps in compiled calls against the same model's steps by transformers, and when they are used at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_drive import drain, engine_of, generation, tokens_of
from making import recipe, save_stock
from torch import Tensor
from transformers import PreTrainedModel

import moe_prism
from moe_prism.elastic.kernels.dots import has_products_of_pairs
from moe_prism.engine.attention import Span
from moe_prism.engine.layers import Layers
from moe_prism.engine.routers import routed
from moe_prism.engine.runner import PROBE, Runner
from moe_prism.offload import load_offloaded, pack_checkpoint
from moe_prism.offload.load import manager_of
from moe_prism.refactor import make_elastic

pytestmark = pytest.mark.skipif(
    not has_products_of_pairs() or torch.cpu._is_amx_tile_supported(),
    reason="this CPU is not one for panels (AVX512-BF16 without AMX)",
)
# Large enough that every projection of attention lies in panels.
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
FAMILIES = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return made(request.param, tmp_path_factory.mktemp("layers"))


def made(family: str, folder: Path, **changes: Any) -> PreTrainedModel:
    stock = save_stock(folder / "stock", family, **SIZES | changes)
    make_elastic(stock, folder / "elastic", recipe())
    return load(folder / "elastic")


def load(elastic: Path) -> PreTrainedModel:
    return moe_prism.load_elastic(elastic, dtype=torch.bfloat16, verify=False)


@torch.inference_mode()
def both(runner: Runner, *step: Any) -> tuple[Tensor, Tensor]:
    """Logits of a step in compiled calls, and by transformers, from the same keys and values."""
    layers = runner._layers
    assert isinstance(layers, Layers)
    before = {number: tuple(pool.clone() for pool in pools) for number, pools in runner.memory.layers.items()}
    compiled = runner.forward(*step)
    for number, pools in before.items():
        for pool, old in zip(runner.memory.layers[number], pools, strict=True):
            pool.copy_(old)
    runner._layers = None
    try:
        return compiled, runner.forward(*step)
    finally:
        runner._layers = layers


@pytest.mark.parametrize("threads", [1, 2])
def test_prompts_and_decoding_at_mixed_budgets(
    model: PreTrainedModel, threads: int, request: pytest.FixtureRequest
) -> None:
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)
    runner = Runner(model, 64)
    layers = runner._layers
    assert layers is not None
    own = layers._layers
    full = runner.dial.full_budget
    tokens = np.arange(20) * 5 % 90
    prompts = [Span(0, 12, 0, 0), Span(12, 5, 20, 0), Span(17, 3, 40, 0)]
    mixed = [Span(0, 1, 0, 12), Span(1, 1, 20, 5), Span(2, 4, 40, 3)]
    for step in (
        (tokens, prompts, [full] * 3, range(20)),
        (tokens[:6], mixed, [full, 2, full // 2], range(6)),
        (tokens[:1], [Span(0, 1, 0, 13)], [1], [0]),
    ):
        compiled, expected = both(runner, *step)
        # Routers add in another order: scores may differ in the last bit of a bfloat16, and experts' shares with them.
        torch.testing.assert_close(compiled, expected, atol=0.15, rtol=0.05)
        assert torch.nn.functional.cosine_similarity(compiled, expected, dim=1).min() > 0.999
        layers._layers = [replace(layer, routed=None) for layer in own]
        compiled, expected = both(runner, *step)
        layers._layers = own
        assert torch.equal(compiled, expected)


def test_a_token_gets_what_it_gets_alone(model: PreTrainedModel) -> None:
    runner = Runner(model, 64)
    tokens, budgets = np.arange(7, 12), [3, runner.dial.full_budget, 1, 2, 3]
    spans = [Span(i, 1, 12 * i, 0) for i in range(5)]
    together = runner.forward(tokens, spans, budgets, range(5))
    for i in range(5):
        alone = runner.forward(tokens[i : i + 1], [Span(0, 1, 12 * i, 0)], budgets[i : i + 1], [0])
        assert torch.equal(alone[0], together[i])


def test_the_engine_gives_the_same_text_whoever_else_is_there(model: PreTrainedModel) -> None:
    full = moe_prism.full_budget(model)
    prompts = {"a": [5, 9, 33, 7], "b": [8] * 11, "c": [61, 3]}
    budgets = {"a": full, "b": 2, "c": full // 2}
    engine = engine_of(model, max_prefill=5)
    for id, prompt in prompts.items():
        engine.submit(generation(id, prompt, 6, budgets[id]))
    together = {id: tokens_of(events) for id, events in drain(engine).items()}
    for id, prompt in prompts.items():
        engine = engine_of(model, max_prefill=5)
        engine.submit(generation(id, prompt, 6, budgets[id]))
        assert tokens_of(drain(engine)[id]) == together[id]


@torch.inference_mode()
def test_a_sliding_window(tmp_path: Path) -> None:
    model = made("mixtral", tmp_path, sliding_window=4)
    runner = Runner(model, 64)
    assert runner.compiled
    full = runner.dial.full_budget
    runner.forward(np.arange(12), [Span(0, 12, 0, 0)], [full], [11])
    compiled, expected = both(runner, np.arange(2), [Span(0, 1, 0, 12), Span(1, 1, 30, 0)], [full] * 2, range(2))
    torch.testing.assert_close(compiled, expected, atol=0.05, rtol=0.05)
    seen = runner.memory.layers[0][0].clone()
    runner.memory.layers[0][0][:, :8] = 100.0  # before the window: nobody looks
    again = runner.forward(np.arange(2), [Span(0, 1, 0, 12), Span(1, 1, 30, 0)], [full] * 2, range(2))
    assert torch.equal(again, compiled)
    runner.memory.layers[0][0].copy_(seen)


def test_what_is_built_in_another_way_keeps_transformers(model: PreTrainedModel, tmp_path: Path) -> None:
    assert not Runner(model, PROBE - 1).compiled  # too little memory to compare
    layer = model.base_model.layers[0]
    attention = layer.self_attn
    clip = getattr(attention.config, "clip_qkv", None)
    try:
        attention.config.clip_qkv = 1e6  # no probe would show it
        assert not Runner(model, 64).compiled
    finally:
        attention.config.clip_qkv = clip
    norm = layer.input_layernorm
    hook = norm.register_forward_hook(lambda _module, _given, out: 2 * out)  # looks as before, and is not
    try:
        assert not Runner(model, 64).compiled
    finally:
        hook.remove()
    assert Runner(model, 64).compiled


@pytest.mark.parametrize("family", ["granitemoe", "gpt_oss", "deepseek_v3"])
def test_families_of_another_kind(family: str, tmp_path: Path) -> None:
    other: dict[str, dict[str, Any]] = {
        "granitemoe": {"residual_multiplier": 0.5},
        "deepseek_v3": {"head_dim": 8, "num_key_value_heads": 4},
    }
    sizes = SIZES | other.get(family, {})
    stock = save_stock(tmp_path / "stock", family, **sizes)
    make_elastic(stock, tmp_path / "elastic", recipe())
    assert not Runner(load(tmp_path / "elastic"), 64).compiled


def test_an_offloaded_model_runs_so_as_well(tmp_path: Path) -> None:
    stock = save_stock(tmp_path / "stock", "olmoe", **SIZES)
    make_elastic(stock, tmp_path / "elastic", recipe())
    pack_checkpoint(tmp_path / "elastic", tmp_path / "packed")
    own = load_offloaded(tmp_path / "packed", 4_000_000_000, dtype=torch.bfloat16, context=64, verify=False)
    try:
        offloaded, inside = Runner(own, 64), Runner(load(tmp_path / "elastic"), 64)
        assert offloaded.compiled
        tokens, spans = np.arange(9) * 7 % 90, [Span(0, 1, 30, 0), Span(1, 8, 0, 0)]
        for k in (offloaded.dial.full_budget, 3):
            found, expected = (runner.forward(tokens, spans, [k] * 2, range(9)) for runner in (offloaded, inside))
            # Blocks are rows, whose sums are of another order than those of panels.
            assert torch.nn.functional.cosine_similarity(found, expected, dim=1).min() > 0.999
    finally:
        manager_of(own).close()


def test_routers_are_known_by_what_they_do(model: PreTrainedModel) -> None:
    mlp = model.base_model.layers[0].mlp
    found = routed(mlp)
    if model.config.model_type == "qwen2_moe":
        assert found is None  # a shared expert is part of it
        return
    assert found is not None
    assert found.router.top_k == model.config.num_experts_per_tok
    hook = mlp.register_forward_hook(lambda _module, _given, out: out + 1)
    try:
        assert routed(mlp) is None
    finally:
        hook.remove()
    gate = mlp.gate
    hook = gate.register_forward_hook(lambda _module, _given, out: (out[0], out[1] * 0.5, out[2]))
    try:
        assert routed(mlp) is None
    finally:
        hook.remove()

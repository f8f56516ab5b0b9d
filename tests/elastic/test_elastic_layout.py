"""Weights in panels: the same values, wherever they are asked for, and in the same memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import logits, recipe, save_stock
from tiny import tiny_model
from torch import nn
from transformers import PreTrainedModel

import moe_prism
from moe_prism.elastic.executors.panels import Panels
from moe_prism.elastic.kernels.dots import has_products_of_pairs
from moe_prism.elastic.layout import lies_in_panels, use_linear_panels, use_panels, use_rows
from moe_prism.elastic.linear import use_fast_linear
from moe_prism.elastic.model import detach
from moe_prism.errors import PrismError
from moe_prism.experts import find_expert_layers
from moe_prism.experts.packing import pack
from moe_prism.refactor import make_elastic

needs_pairs = pytest.mark.skipif(
    not has_products_of_pairs() or torch.cpu._is_amx_tile_supported(),
    reason="this CPU is not one for panels (AVX512-BF16 without AMX)",
)
SIZES = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose sub-experts fill panels."""
    return save_stock(tmp_path_factory.mktemp("layout") / "stock", **SIZES)


@pytest.fixture(scope="module")
def made(stock: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("layout") / "elastic"
    make_elastic(stock, out, recipe())
    return out


def load(made: Path, **how: bool) -> PreTrainedModel:
    return moe_prism.load_elastic(made, dtype=torch.bfloat16, verify=False, **how)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("size", [22, 32, 48, 96])
@pytest.mark.parametrize("packed", [False, True])
def test_panels_give_back_what_they_were_made_of(size: int, n: int, packed: bool) -> None:
    gate_up, down = torch.randn(3, 2 * size * n, 128).bfloat16(), torch.randn(3, 128, size * n).bfloat16()
    given = gate_up.clone(), (down.transpose(1, 2).contiguous().transpose(1, 2) if packed else down.clone())
    panels = Panels.of(*given, n, in_place=True)
    for found, expected in zip(panels.rows(size), (gate_up, down), strict=True):
        assert torch.equal(found, expected)
    own = panels.gate_up.ctypes.data == given[0].data_ptr() and panels.down.ctypes.data == given[1].data_ptr()
    assert own == (size % 32 == 0)  # padded, they cannot lie where they came from
    copied = Panels.of(gate_up, down, n)
    assert (copied.gate_up == panels.gate_up).all()
    assert (copied.down == panels.down).all()


@needs_pairs
def test_the_loader_lays_out_what_budgets_run_whole(made: Path) -> None:
    model, rows = load(made), load(made, panels=False)
    assert all(lies_in_panels(layer.module) for layer in find_expert_layers(model))
    assert not any(lies_in_panels(layer.module) for layer in find_expert_layers(rows))
    full = moe_prism.full_budget(model)
    for k_active in (full, full // 2, 1):
        with moe_prism.budget(model, k_active), moe_prism.budget(rows, k_active):
            found, expected = logits(model), logits(rows)
        torch.testing.assert_close(found, expected, atol=0.1, rtol=0.05)  # activations are rounded in between
        assert torch.nn.functional.cosine_similarity(found.flatten().float(), expected.flatten().float(), 0) > 0.9999
    assert not lies_in_panels(find_expert_layers(moe_prism.load_elastic(made, dtype=torch.float32))[0].module)
    for executor in ("cpu", "masked"):
        named = moe_prism.load_elastic(made, dtype=torch.bfloat16, executor=executor)
        assert not lies_in_panels(find_expert_layers(named)[0].module)


@needs_pairs
@pytest.mark.parametrize("changes", [{"neurons": "gate-first"}, {"gate": "proxy", "gate_options": {"gate_neurons": 2}}])
def test_neurons_and_gates_that_read_weights_keep_rows(stock: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    make_elastic(stock, tmp_path / "out", recipe(**changes))
    model = load(tmp_path / "out")
    assert not any(lies_in_panels(layer.module) for layer in find_expert_layers(model))
    with moe_prism.budget(model, 3):
        assert logits(model).isfinite().all()


@needs_pairs
def test_what_leaves_the_module_is_rows(made: Path, tmp_path: Path) -> None:
    rows, model = load(made, panels=False), load(made)
    expected = rows.state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    model.save_pretrained(tmp_path / "saved")
    saved = type(model).from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert all(torch.equal(value, expected[key]) for key, value in saved.state_dict().items())
    assert all(lies_in_panels(layer.module) for layer in find_expert_layers(model.to("cpu")))
    moved = copy.deepcopy(model).to(torch.float32)
    assert torch.equal(moved.state_dict()["lm_head.weight"], expected["lm_head.weight"].float())
    layer = find_expert_layers(moved)[0].module
    assert torch.equal(layer.down_proj, find_expert_layers(rows)[0].module.down_proj.float())
    assert not lies_in_panels(layer)
    assert lies_in_panels(find_expert_layers(model)[0].module)  # the copy's hooks were its own
    detach(model, "eager")
    stock = type(model).from_pretrained(made, dtype=torch.bfloat16, experts_implementation="eager")
    assert torch.equal(logits(model), logits(stock))


@needs_pairs
def test_weights_can_be_loaded_into_it(made: Path) -> None:
    model = load(made)
    other = {key: value + 1 for key, value in load(made, panels=False).state_dict().items()}
    model.load_state_dict(other)
    assert all(torch.equal(value, other[key]) for key, value in model.state_dict().items())
    with moe_prism.budget(model, 3):
        assert logits(model).isfinite().all()


@needs_pairs
def test_what_panels_cannot_run_is_refused(made: Path) -> None:
    module = find_expert_layers(load(made))[0].module
    index, weight = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4)
    x = torch.randn(2, 64)
    with pytest.raises(PrismError, match=r"not torch\.float32 on cpu; load with panels=False"):
        module(x, index, weight)
    with pytest.raises(PrismError, match="no gradients"):
        module(x.bfloat16().requires_grad_(), index, weight)
    module.__dict__["_moe_prism"].dial.executor = "reference"
    with pytest.raises(PrismError, match="'reference' reads rows"):
        module(x.bfloat16(), index, weight)


@needs_pairs
def test_a_module_goes_there_and_back(tmp_path: Path) -> None:
    module = find_expert_layers(tiny_model("olmoe", **SIZES).bfloat16())[0].module
    before = module.gate_up_proj.clone(), module.down_proj.clone()
    pack(module)
    assert use_panels(module, 4)
    assert (module.gate_up_proj.device.type, module.gate_up_proj.shape) == ("meta", before[0].shape)
    use_rows(module)
    use_rows(module)
    assert torch.equal(module.gate_up_proj, before[0])
    assert torch.equal(module.down_proj, before[1])
    assert not use_panels(find_expert_layers(tiny_model("olmoe"))[0].module, 4)  # fp32
    assert not use_panels(find_expert_layers(tiny_model("gpt_oss", **SIZES).bfloat16())[0].module, 4)  # biases


def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    """A linear layer in panels if it is large enough."""
    layer = nn.Linear(inputs, outputs, bias=bias).bfloat16().requires_grad_(False)
    use_fast_linear(holder := nn.Sequential(layer))
    use_linear_panels(holder)
    return layer


@needs_pairs
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 70), st.sampled_from([(512, 64), (514, 128), (256, 320)]), st.booleans(), st.integers(0, 999))
def test_a_linear_layer_in_panels(tokens: int, size: tuple[int, int], bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    layer = linear(*size, bias=bias)
    assert lies_in_panels(layer)
    weight = layer.state_dict()["weight"]
    x = torch.randn(tokens, size[0]).bfloat16()
    found = layer(x[None])[0]
    added = None if layer.bias is None else layer.bias.float()
    expected = nn.functional.linear(x.float(), weight.float(), added)
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=1e-2)  # rounded once
    if tokens:
        assert torch.equal(layer(x[-1:]), found[-1:])  # alone as together


@needs_pairs
@pytest.mark.parametrize("in_place", [False, True])
def test_linear_layers_keep_their_values(in_place: bool) -> None:
    layer = nn.Linear(512, 192).bfloat16().requires_grad_(False)
    before, address = layer.weight.clone(), layer.weight.data_ptr()
    use_fast_linear(nn.Sequential(layer))
    use_linear_panels(layer, in_place=in_place)
    assert (layer.panels.weight.ctypes.data == address) == in_place
    assert torch.equal(layer.state_dict()["weight"], before)
    with pytest.raises(PrismError, match=r"not torch\.float32 on cpu; load with panels=False"):
        layer(torch.randn(1, 512))
    layer.to(torch.float32)
    assert torch.equal(layer.weight, before.float())
    torch.testing.assert_close(
        layer(torch.ones(1, 512)), before.float().sum(1)[None] + layer.bias, atol=1e-4, rtol=1e-4
    )


@needs_pairs
def test_linear_layers_that_keep_rows() -> None:
    assert not lies_in_panels(linear(64, 64))  # small
    assert not lies_in_panels(linear(512, 100))  # no whole panels
    tied, table = nn.Linear(512, 256, bias=False).bfloat16(), nn.Embedding(256, 512)
    table.weight = tied.weight
    use_fast_linear(model := nn.ModuleList([tied, table]))
    use_linear_panels(model)
    assert not lies_in_panels(tied)
    assert table(torch.tensor([3])).shape == (1, 512)

"""Budgets of rows and tokens, by number, share and name, through the model's own calls."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from making import elastic_model, recipe, save_stock
from tiny import tokens
from torch import nn

import moe_prism
from moe_prism.elastic import dial_of
from moe_prism.elastic.dial import Dial, named_points
from moe_prism.elastic.linear import FastLinear, use_fast_linear
from moe_prism.errors import PrismError

GATES = {"proxy": {"gate_neurons": 2}, "linear": {}, "static": {}}


@pytest.mark.parametrize("executor", ["reference", "cpu", "grouped"])
@pytest.mark.parametrize("gate", GATES)
def test_a_row_gets_in_a_mixed_batch_what_it_gets_alone(gate: str, executor: str, tmp_path) -> None:
    model = elastic_model("olmoe", tmp_path, gate=gate, gate_options=GATES[gate])
    dial_of(model).executor = executor
    ids = tokens(5, 7)
    rows = [1, 16, 5, 9, 16]
    with torch.no_grad():
        with moe_prism.budget(model, rows):
            mixed = model(ids).logits
        for row, k_active in enumerate(rows):
            with moe_prism.budget(model, k_active):
                alone = model(ids[row : row + 1]).logits[0]
            torch.testing.assert_close(mixed[row], alone, atol=2e-5, rtol=1e-4)
        with moe_prism.budget(model, 16):
            assert not torch.allclose(model(ids).logits[0], mixed[0], atol=1e-3)


def test_every_token_may_have_its_own_budget(tmp_path) -> None:
    model = elastic_model("olmoe", tmp_path)
    dial = dial_of(model)
    ids = tokens(1, 6)
    with torch.no_grad():
        dial.fill([16, 3, 3, 16, 1, 8])
        filled = model(ids).logits
        address = dial._buffer.data_ptr()
        dial.fill(torch.tensor([16] * 6))
        same_as_full = model(ids).logits
        assert dial._buffer.data_ptr() == address  # one persistent buffer
        dial.fill(None)
        full = model(ids).logits
    torch.testing.assert_close(same_as_full, full, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(filled[0, 0], full[0, 0], atol=2e-5, rtol=1e-4)  # nothing before it was cheaper
    assert not torch.allclose(filled[0, 1], full[0, 1], atol=1e-4)
    with pytest.raises(PrismError, match=r"1 to 16 \(full budget\), got 17"):
        dial.fill([1, 17])
    dial.fill([4, 4])
    with pytest.raises(PrismError, match="2 budgets were filled in, but the step has 6 tokens"):
        model(ids)


def test_generate_takes_budgets(tmp_path) -> None:
    model = elastic_model("olmoe", tmp_path)
    how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = tokens(3, 5)
    mixed = model.generate(ids, k_active=[1, 16, 4], **how)
    for row, k_active in enumerate([1, 16, 4]):
        assert torch.equal(mixed[row], model.generate(ids[row : row + 1], k_active=k_active, **how)[0])
    full = model.generate(ids, **how)
    assert torch.equal(full, model.generate(ids, k_active=1.0, **how))
    assert torch.equal(full, model.generate(ids, k_active="full", **how))
    assert not torch.equal(full, mixed)
    several = model.generate(ids, k_active=[1, 16, 4], num_return_sequences=2, num_beams=2, **how)
    assert several.shape[0] == 6
    assert dial_of(model).rows is None
    with pytest.raises(PrismError, match="4 rows do not fit a step of 15 tokens"):
        model.generate(ids, k_active=[1, 2, 3, 4], **how)


def test_the_method_and_a_copy_of_the_model(tmp_path) -> None:
    model = elastic_model("olmoe", tmp_path)
    twin = copy.deepcopy(model)
    model.set_budget(0.5)
    assert dial_of(model).k_active == 8
    assert dial_of(twin).k_active == 16
    twin.set_budget(3)
    assert (dial_of(model).k_active, dial_of(twin).k_active) == (8, 3)


def test_shares_and_names_become_numbers() -> None:
    dial = Dial(32)
    assert [dial.resolve(v) for v in (1, 32, 1.0, 0.5, 0.999, 0.01, 9 / 32)] == [1, 32, 32, 16, 31, 1, 9]
    assert dial.resolve("full") == 32
    with pytest.raises(PrismError, match="no operating point 'low'; measured: full"):
        dial.resolve("low")
    loss = {32: 2.0, 24: 2.009, 16: 2.04, 12: 2.03, 8: 2.2, 1: 4.0}
    assert named_points(32, loss) == {"full": 32, "high": 24, "medium": 12, "low": 12}
    assert named_points(32, {8: 2.0}) == {"full": 32}


@given(st.floats(1e-6, 1.0), st.integers(1, 600))
@settings(max_examples=200)
def test_a_share_is_a_limit(share: float, full: int) -> None:
    k_active = Dial(full).resolve(share)
    assert 1 <= k_active <= full
    assert k_active <= share * full + 1e-6 or k_active == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_fast_linear_layers_are_the_same_layers(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 260, bias=bias), nn.Linear(260, 300, bias=bias), nn.Linear(8, 8))
    model = model.to(dtype).eval()
    plain = copy.deepcopy(model)
    use_fast_linear(model)
    assert all(type(m) is FastLinear for m in model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for shape in ((1, 512), (2, 2, 512), (3, 400, 512), (0, 512), (512,)):
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            torch.testing.assert_close(model[:2](x), plain[:2](x), atol=tolerance, rtol=tolerance)
    strided = torch.randn(512, 2).to(dtype).t()  # not contiguous
    with torch.no_grad():
        torch.testing.assert_close(model[0](strided), plain[0](strided), atol=tolerance, rtol=tolerance)
    x = torch.randn(1, 512, dtype=dtype, requires_grad=True)
    model[:2](x).sum().backward()  # training goes the plain way
    assert x.grad is not None


def test_a_loaded_model_has_them_unless_told_otherwise(tmp_path) -> None:
    out = tmp_path / "elastic"
    moe_prism.make_elastic(save_stock(tmp_path / "stock"), out, recipe())
    fast = moe_prism.load_elastic(out, dtype=torch.float32)
    plain = moe_prism.load_elastic(out, dtype=torch.float32, fast_linear=False)
    assert type(fast.lm_head) is FastLinear
    assert type(plain.lm_head) is nn.Linear
    with pytest.raises(PrismError, match="unknown executor 'gpu'"):
        moe_prism.load_elastic(out, executor="gpu")
    half = moe_prism.load_elastic(out, dtype=torch.float16, executor="cpu")
    with pytest.raises(PrismError, match=r"'cpu' cannot run this layer: .*torch.float16"):
        half(tokens(1, 2))

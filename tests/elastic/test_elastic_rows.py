"""The rows that kernels read are those of the module's present weights, and keep nothing alive."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from test_elastic_executors import layer_of, random_selection
from torch import nn

from moe_prism.elastic.executors import EXECUTORS
from moe_prism.elastic.executors.rows import rows_of
from moe_prism.elastic.linear import FastLinear, use_fast_linear
from moe_prism.experts.packing import pack, unpack


def check(module: nn.Module) -> None:
    selection = random_selection(3, 3, 4, int(module.num_experts), "random", 0)
    x = torch.randn(3, 32)
    with torch.no_grad():
        fast, plain = (EXECUTORS.create(name).run(module, x, selection, 4) for name in ("cpu", "reference"))
    torch.testing.assert_close(fast, plain, atol=1e-4, rtol=1e-4)


def test_changed_weights_are_used() -> None:
    module = layer_of("olmoe")
    check(module)
    with torch.no_grad():
        module.down_proj.mul_(2)  # in place
    check(module)
    module.down_proj.data = torch.randn_like(module.down_proj)  # another storage
    pack(module)
    check(module)
    module.gate_up_proj = nn.Parameter(torch.randn_like(module.gate_up_proj), requires_grad=False)  # another parameter
    check(module)


def test_packing_and_dtype_are_looked_at_anew() -> None:
    module = layer_of("olmoe")
    assert rows_of(module) is not None
    unpack(module)
    assert rows_of(module) is None  # the same storage, in another order
    pack(module)
    check(module)
    assert rows_of(module.half()) is None
    assert EXECUTORS.create("cpu").refusal(module, torch.randn(1, 32)) is not None


@pytest.mark.parametrize("made", [lambda: layer_of("olmoe"), lambda: nn.Linear(2048, 1024)])
def test_weights_go_with_their_module(made) -> None:
    module = made()
    with torch.no_grad():
        if isinstance(module, nn.Linear):
            use_fast_linear(holder := nn.Sequential(module))
            assert type(module) is FastLinear
            holder(torch.randn(2, 2048))
            del holder
            storage = weakref.ref(module.weight.untyped_storage())
        else:
            check(module)
            storage = weakref.ref(module.down_proj.untyped_storage())
    gc.collect()
    assert storage() is not None
    del module
    gc.collect()
    assert storage() is None


def test_a_linear_layer_uses_its_present_weights() -> None:
    layer = nn.Linear(2048, 1024, bias=False)
    use_fast_linear(nn.Sequential(layer))
    x = torch.randn(2, 2048)
    with torch.no_grad():
        layer(x)
        layer.weight.mul_(3)
        torch.testing.assert_close(layer(x), x @ layer.weight.t(), atol=1e-3, rtol=1e-4)
        layer.weight.data = torch.randn_like(layer.weight)
        torch.testing.assert_close(layer(x), x @ layer.weight.t(), atol=1e-3, rtol=1e-4)

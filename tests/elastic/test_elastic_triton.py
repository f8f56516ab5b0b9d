"""Triton kernels against ``reference`` in float64: on a GPU if there is one, else in Triton's interpreter.

The interpreter must be on before anything imports Triton, so without a GPU run this file alone.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import torch

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import copy
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import elastic_model
from test_elastic_some_neurons import by_hand
from tiny import tiny_model, tokens
from torch import Tensor, nn

from moe_prism.elastic import budget, dial_of
from moe_prism.elastic.executors import EXECUTORS, NeuronRule, choose_executor
from moe_prism.elastic.executors import triton as executor_file
from moe_prism.elastic.executors.triton import Tile, TritonExecutor, device_refusal, kept_blocks
from moe_prism.elastic.plan import Plan
from moe_prism.elastic.selection import Selection, gather_selection
from moe_prism.errors import PrismError
from moe_prism.experts import find_expert_layers
from moe_prism.experts.neurons import leading_activations
from moe_prism.experts.packing import pack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WHY_NOT = device_refusal(DEVICE)
needs_triton = pytest.mark.skipif(WHY_NOT is not None, reason=f"{WHY_NOT} (run this file alone)")
# Largest error as a share of the token's largest output. The interpreter cuts bfloat16 off, GPUs round it.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 1e-2 if DEVICE.type == "cuda" else 3e-2}


@cache
def layer_of(neurons: int = 16, hidden: int = 32, dtype: torch.dtype = torch.float32, experts: int = 8) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_model("olmoe", intermediate_size=neurons, hidden_size=hidden, num_experts=experts)
    module = find_expert_layers(model)[0].module.to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pack(module)
    return module.eval().to(DEVICE)


@cache
def exact_twin(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).double()


def inputs(
    module: nn.Module, tokens: int, n: int, kind: str = "random", k: int = 2, seed: int = 0
) -> tuple[Tensor, Selection]:
    generator = torch.Generator().manual_seed(seed)
    experts = int(module.num_experts)
    index = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :k]
    if kind == "one expert":  # the others have no token
        index = torch.full((tokens, 1), seed % experts)
    chosen = torch.rand(*index.shape, n, generator=generator) < torch.rand(1, generator=generator)
    if kind == "full":
        chosen[:] = True
    selection = gather_selection(chosen, index, torch.rand(index.shape, generator=generator))
    x = torch.randn(tokens, module.down_proj.shape[1], generator=generator)
    return x.to(DEVICE, module.down_proj.dtype), Selection(*(t.to(DEVICE) for t in selection))


@torch.no_grad()
def run(module: nn.Module, x: Tensor, selection: Selection, n: int, computed: Tensor | None = None) -> Tensor:
    executor = TritonExecutor()
    assert executor.refusal(module, x) is None
    return executor.run(module, x, selection, n, computed)


def check(module: nn.Module, x: Tensor, selection: Selection, n: int) -> None:
    found = run(module, x, selection, n)
    with torch.no_grad():
        doubles = selection._replace(weight=selection.weight.double())
        expected = EXECUTORS.create("reference").run(exact_twin(module), x.double(), doubles, n)
    agree(found, expected, x)


def agree(found: Tensor, expected: Tensor, x: Tensor) -> None:
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    error = (found.double() - expected).abs().amax(1)
    assert (error <= TOLERANCE[x.dtype] * expected.abs().amax(1)).all(), error


@needs_triton
@given(
    dtype=st.sampled_from(list(TOLERANCE)),
    tokens=st.integers(0, 5),
    n=st.sampled_from([1, 2, 4]),
    kind=st.sampled_from(["random", "one expert", "full"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=30, deadline=None)
def test_the_sum_is_that_of_reference(dtype: torch.dtype, tokens: int, n: int, kind: str, seed: int) -> None:
    module = layer_of(dtype=dtype)
    check(module, *inputs(module, tokens, n, kind, seed=seed), n)


@needs_triton
def test_tokens_with_more_pairs_than_are_added_at_once() -> None:
    module = layer_of()
    x, selection = inputs(module, 2, 4, "full", k=8)
    assert len(selection.token) // 2 == 32 > executor_file._PAIRS_ADDED_AT_ONCE
    check(module, x, selection, 4)


@needs_triton
@pytest.mark.parametrize(("neurons", "hidden", "n"), [(15, 24, 3), (21, 72, 7), (6, 136, 2), (35, 8, 5), (80, 270, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_that_no_tile_divides(neurons: int, hidden: int, n: int, dtype: torch.dtype) -> None:
    module = layer_of(neurons, hidden, dtype)
    check(module, *inputs(module, 3, n, "full", k=1), n)


@needs_triton
@pytest.mark.parametrize("experts", [1, 3])  # tiles of 64 and of 32 pairs
@pytest.mark.parametrize("kind", ["one expert", "full"])
def test_sub_experts_of_several_tiles(kind: str, experts: int) -> None:
    module = layer_of(experts=experts)
    x, selection = inputs(module, 70, 1, "full", k=1)
    if kind == "one expert":
        selection = selection._replace(sub_expert=torch.full_like(selection.sub_expert, experts - 1))
    assert Tile.of(70, experts, 32, 32, 4).rows == (128 if experts == 1 else 32)
    check(module, x, selection, 1)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_depends_on_the_others(dtype: torch.dtype) -> None:
    module = layer_of(dtype=dtype)
    x, selection = inputs(module, 6, 4, "one expert", seed=5)
    together = run(module, x, selection, 4)
    assert together.abs().amax(1).count_nonzero() >= 4
    assert torch.equal(run(module, x, selection, 4), together)
    for t in range(6):
        mine = Selection(*(part[selection.token == t] for part in selection))
        alone = run(module, x[t : t + 1], mine._replace(token=torch.zeros_like(mine.token)), 4)
        assert torch.equal(alone[0], together[t])
    x[2, 5] = float("nan")
    spoiled = run(module, x, selection, 4)
    others = torch.arange(6, device=DEVICE) != 2
    assert torch.equal(spoiled[others], together[others])
    assert spoiled[2].isnan().all() == (selection.token == 2).any()


@needs_triton
def test_what_a_gate_computed_changes_nothing() -> None:
    module = layer_of()
    x, selection = inputs(module, 3, 4, "one expert", seed=1)
    with torch.no_grad():
        computed = leading_activations(module, 1, x, 4, 2)[:, None]
    assert torch.equal(run(module, x, selection, 4, computed), run(module, x, selection, 4))


@needs_triton
def test_inputs_that_are_views() -> None:
    module = layer_of()
    x, selection = inputs(module, 4, 1, "full", k=1)
    wide = torch.stack([x, x + 1], dim=2).flatten(1)[:, ::2]
    assert not wide.is_contiguous()
    assert torch.equal(run(module, wide, selection, 1), run(module, x, selection, 1))


def rule_of(module: nn.Module, block: int, how: object, tokens: int) -> NeuronRule:
    """A threshold, or counts that take turns."""
    scale = torch.rand(module.down_proj.shape[0], module.down_proj.shape[2], generator=torch.Generator().manual_seed(1))
    if isinstance(how, float):
        return NeuronRule(scale.to(DEVICE), threshold=how, block=block)
    counts = torch.tensor([how[t % len(how)] for t in range(tokens)], dtype=torch.int64)
    return NeuronRule(scale.to(DEVICE), counts, block=block)


@torch.no_grad()
def run_some(module: nn.Module, x: Tensor, selection: Selection, n: int, rule: NeuronRule) -> Tensor:
    executor = TritonExecutor()
    assert executor.refusal(module, x) is executor.skip_refusal(rule.block) is None
    return executor.run_some(module, x, selection, n, rule)


@needs_triton
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    tokens=st.integers(0, 4),
    n_and_block=st.sampled_from([(1, 16), (1, 32), (1, 48), (1, 96), (2, 16), (2, 48)]),
    how=st.sampled_from([[1], [50], [999], [16, 500, 64], 2.0, 1e9]),
    kind=st.sampled_from(["random", "one expert", "full"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_blocks_run_that_matter_most(
    dtype: torch.dtype, tokens: int, n_and_block: tuple[int, int], how: object, kind: str, seed: int
) -> None:
    n, block = n_and_block
    module = layer_of(96, 40, dtype)
    x, selection = inputs(module, tokens, n, kind, seed=seed)
    rule = rule_of(module, block, how, tokens)
    doubles = selection._replace(weight=selection.weight.double())
    with torch.no_grad():
        expected = by_hand(exact_twin(module), x.double(), doubles, n, rule)
    agree(run_some(module, x, selection, n, rule), expected, x)


@needs_triton
@pytest.mark.parametrize(("tokens", "experts"), [(70, 1), (40, 3)])  # tiles of 128 and of 16 pairs
def test_blocks_of_sub_experts_of_several_tiles(tokens: int, experts: int) -> None:
    module = layer_of(64, 24, experts=experts)
    x, selection = inputs(module, tokens, 1, "full", k=1)
    selection = selection._replace(sub_expert=torch.full_like(selection.sub_expert, experts - 1))
    rule = rule_of(module, 32, [32, 64, 1], tokens)
    doubles = selection._replace(weight=selection.weight.double())
    with torch.no_grad():
        expected = by_hand(exact_twin(module), x.double(), doubles, 1, rule)
    agree(run_some(module, x, selection, 1, rule), expected, x)


@needs_triton
@pytest.mark.parametrize("k_active", [1, 2, 3])
def test_a_model_runs_its_blocks_on_it(k_active: int, tmp_path) -> None:
    how = {"num_sub_experts": 1, "neurons": "gate-first", "solver": "importance", "neuron_block": 16}
    model = elastic_model("olmoe", tmp_path, **how).to(DEVICE)
    dial, found = dial_of(model), []
    dial.plan = Plan([1, 4, 4, 4], 16, 16)
    for dial.executor in ("triton", "masked"):
        with torch.no_grad(), budget(model, k_active):
            found.append(model(tokens(batch=1, length=4).to(DEVICE)).logits)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@needs_triton
@pytest.mark.parametrize("how", [[32], 0.5])
def test_blocks_of_a_nan_are_not_skipped_and_others_do_not_see_it(how: object) -> None:
    module = layer_of(64, 24)
    x, selection = inputs(module, 3, 1, "full", k=2)
    rule = rule_of(module, 16, how, 3)
    clean = run_some(module, x, selection, 1, rule)
    x[1, 5] = float("nan")
    spoiled = run_some(module, x, selection, 1, rule)
    assert spoiled[1].isnan().all()
    assert torch.equal(spoiled[::2], clean[::2])


@needs_triton
def test_a_block_that_nobody_keeps_is_not_read() -> None:
    """Down rows that are read spoil the sum if they are NaN, whatever they are multiplied by."""
    module = copy.deepcopy(layer_of(64, 24))
    pack(module)
    x, selection = inputs(module, 3, 1, "full", k=1)
    rule = rule_of(module, 16, [1], 3)
    rule.scale[:, :48] = 0  # the last block of every expert matters most
    clean = run_some(module, x, selection, 1, rule)
    module.down_proj.data[:, :, :48] = float("nan")
    module.gate_up_proj.data[:, 64:112] = float("nan")
    assert torch.equal(run_some(module, x, selection, 1, rule), clean)
    assert run_some(module, x, selection, 1, rule_of(module, 16, [64], 3)).isnan().all()


@pytest.mark.skipif(DEVICE.type == "cuda", reason="counts calls of the interpreter")
@needs_triton
def test_products_of_blocks_that_nobody_keeps_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = executor_file._block_kernels()
    module, made, real = layer_of(96, 24), [], kernels.dot
    monkeypatch.setattr(kernels, "dot", lambda *given: made.append(given) or real(*given))
    x, selection = inputs(module, 1, 1, "full", k=1)

    def products(count: int) -> int:
        made.clear()
        run_some(module, x, selection, 1, rule_of(module, 32, [count], 1))
        return len(made)

    gates = 3  # tiles of 32 neurons, one step along 24 inputs; up and down rows of a block take two more products
    assert [products(count) for count in (32, 64, 96)] == [gates + 2, gates + 4, gates + 6]


def test_blocks_among_equals_are_the_first_ones() -> None:
    token = torch.tensor([1, 0, 1])
    score = torch.tensor([[2.0, 3.0], [torch.nan, 1.0], [3.0, 2.0]])
    found = kept_blocks(token, score, NeuronRule(torch.ones(1, 4), torch.tensor([2, 6]), block=2))
    assert found.tolist() == [[1, 1], [1, 0], [1, 0]]
    found = kept_blocks(token, score, NeuronRule(torch.ones(1, 4), threshold=2.0, block=2))
    assert found.tolist() == [[0, 1], [1, 0], [1, 0]]


@given(counts=st.lists(st.integers(0, 300), min_size=1, max_size=20), hidden=st.integers(1, 4096))
def test_there_are_enough_programs_for_any_selection(counts: list[int], hidden: int) -> None:
    pairs, groups = sum(counts), len(counts)
    tile = Tile.of(pairs, groups, hidden, 32, 2)
    tiles, columns = tile.grid(pairs, groups, hidden)
    needed = sum(-(-count // tile.rows) for count in counts)
    assert needed <= tiles <= needed + groups
    assert columns * tile.cols >= hidden > (columns - 1) * tile.cols


COMPILE = """
import sys, triton
from dataclasses import replace
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moe_prism.elastic.executors import triton_block_kernels as blocks, triton_kernels as kernels
from moe_prism.elastic.executors.triton import Tile, _options

def check(kernel, tile, architecture, **constants):
    options = _options(tile) if kernel is not kernels.add_pairs else {"ROWS": 16, "COLS": 256}
    how = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    constants |= options
    kinds = {"token": "*i64", "order": "*i64", "starts": "*i32", "keep": "*i32"}
    kinds |= dict.fromkeys(("scale", "gates", "score"), "*fp32")
    signature = {n: "constexpr" if n in constants else kinds.get(n, "*bf16") for n in kernel.arg_names}
    constants = {name: value for name, value in constants.items() if name in signature}
    target = GPUTarget("cuda", architecture, 32)
    made = triton.compile(ASTSource(kernel, signature, constexprs=constants), target=target, options=how)
    assert made.metadata.shared <= 99 * 1024, (kernel, tile, made.metadata.shared)
    return made.asm["ptx"]

assert not kernels.INTERPRETED
for architecture, pairs, hidden, size in ((80, 16, 2040, 250), (90, 40000, 2048, 256)):
    common = {"GROUPS": 256, "SIZE": size, "NEURONS": 4 * size, "HIDDEN": hidden, "WIDTH": 256}
    of_blocks = [(blocks.score_gates, hidden, 32), (blocks.multiply_up, hidden, 32), (blocks.project_blocks, size, 64)]
    for kernel, inner, cols in ((kernels.activate, hidden, 32), (kernels.project, size, 64), *of_blocks):
        tile = Tile.of(pairs, 256, inner, cols, 2)
        if kernel not in (kernels.activate, kernels.project):
            common |= {"SIZE": 256, "NEURONS": 1024, "BLOCK": 64}
            tile = replace(tile, cols=min(tile.cols, 64), depth=min(tile.depth, 64))
        ptx = check(kernel, tile, architecture, **common)
        assert ("wgmma.mma_async" if pairs == 40000 else "mma.sync") in ptx  # matrix units
check(kernels.add_pairs, None, 80, HIDDEN=2048)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason=f"{WHY_NOT}")
def test_the_kernels_compile_for_gpus_and_fit_their_shared_memory(tmp_path) -> None:
    """The interpreter takes Python that the compiler refuses. 99 KiB is what the smaller GPUs have."""
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE], check=True, timeout=250, env=env)


class ClampedExperts(nn.Module):
    """A family with an activation of its own."""

    has_bias, is_concatenated, is_transposed = False, True, False

    def _apply_gate(self, projected: Tensor) -> Tensor:
        return projected


def test_layers_are_refused_clearly(monkeypatch) -> None:
    monkeypatch.setattr(executor_file, "device_refusal", lambda device: None)
    module = layer_of()
    x = torch.zeros(1, 32, device=DEVICE)

    def refusal(changed: nn.Module = module, x: Tensor = x) -> str:
        return TritonExecutor().refusal(changed, x) or "none"

    assert refusal() == "none"
    assert type(choose_executor("triton", module, x, 2)) is TritonExecutor
    assert type(choose_executor("triton", module, x, 2, "neurons", block=48)) is TritonExecutor
    for block in (1, 8, 24):
        with pytest.raises(PrismError, match=rf"multiple of 16 \(neuron_block .* in blocks of {block}; use 'auto'"):
            choose_executor("triton", module, x, 2, "neurons", block=block)
    assert "no_grad" in refusal(x=x.clone().requires_grad_())
    assert "float64 x torch.float32" in refusal(x=x.double())
    assert "float64" in refusal(exact_twin(module), x.double())
    assert "activation SiLU" in refusal(ClampedExperts())
    gelu = copy.deepcopy(module)
    gelu.act_fn = nn.GELU()
    assert "activation SiLU" in refusal(gelu)
    unpacked = copy.deepcopy(module)
    unpacked.down_proj.data = unpacked.down_proj.data.contiguous()
    assert "not packed" in refusal(unpacked)
    biased = find_expert_layers(tiny_model("gpt_oss"))[0].module
    with pytest.raises(PrismError, match="'triton' cannot run this layer: it knows experts without biases"):
        choose_executor("triton", biased, x, 2)
    assert "are on meta" in refusal(copy.deepcopy(module).to("meta"))


def test_devices_are_refused_clearly(monkeypatch) -> None:
    monkeypatch.setattr(executor_file, "_installed", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET=1" in device_refusal(torch.device("cpu"))
    assert "on mps" in device_refusal(torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "capability 7.5" in device_refusal(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert device_refusal(torch.device("cuda")) is None
    monkeypatch.setattr(executor_file, "_installed", lambda: False)
    assert "pip install 'moe-prism[triton]'" in device_refusal(torch.device("cuda"))


def test_the_package_works_without_triton() -> None:
    script = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch, moe_prism.elastic.layer
from moe_prism.elastic.executors.triton import device_refusal
assert "not installed" in device_refusal(torch.device("cuda"))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=200)

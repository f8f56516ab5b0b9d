"""Every executor against ``reference``, on selections that hypothesis makes."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from torch import nn

from moe_prism.elastic.executors import EXECUTORS, NeuronRule, choice, choose_executor, cpu
from moe_prism.elastic.executors.choice import MASKED_FROM, MASKED_LARGE_NEURONS_FROM
from moe_prism.elastic.kernels.dots import has_products_of_pairs
from moe_prism.elastic.selection import Selection, gather_selection
from moe_prism.errors import PrismError
from moe_prism.experts import find_expert_layers
from moe_prism.experts.neurons import leading_activations
from moe_prism.experts.packing import pack, packed_rows

FAST = ["cpu", "grouped", "masked"]
FAMILIES = ["olmoe", "gpt_oss"]  # plain; biases, interleaved and transposed weights, clamped activation
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def layer_of(family: str, neurons: int = 16, hidden: int = 32, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_model(family, intermediate_size=neurons, hidden_size=hidden)
    module = find_expert_layers(model)[0].module.to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pack(module)
    return module.eval()


def random_selection(tokens: int, k: int, n: int, experts: int, kind: str, seed: int) -> Selection:
    generator = torch.Generator().manual_seed(seed)
    if kind == "one expert":  # all tokens route the same way
        index = torch.arange(k).expand(tokens, k)
    elif kind == "few experts":  # the rest have no token
        index = torch.stack([torch.randperm(k + 1, generator=generator)[:k] for _ in range(tokens)] or [torch.zeros(k)])
        index = index[:tokens].long()
    else:
        index = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :k]
    chosen = torch.rand(tokens, k, n, generator=generator) < torch.rand(1, generator=generator)
    if kind == "sentinels":  # slots without an expert on this device choose nothing
        chosen[:, -1] = False
    return gather_selection(chosen, index, torch.rand(tokens, k, generator=generator))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FAST)
@given(
    tokens=st.integers(0, 9),
    n=st.sampled_from([1, 2, 4, 8]),
    kind=st.sampled_from(["random", "one expert", "few experts", "sentinels"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25, deadline=None)
def test_every_executor_gives_what_reference_gives(
    name: str, family: str, dtype: torch.dtype, tokens: int, n: int, kind: str, seed: int
) -> None:
    module = _cached_layer(family, dtype)
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)
    selection = random_selection(tokens, 2, n, int(module.num_experts), kind, seed)
    with torch.no_grad():
        expected = EXECUTORS.create("reference").run(module, x, selection, n)
        executor = EXECUTORS.create(name)
        assert executor.refusal(module, x) is None
        found = executor.run(module, x, selection, n)
    assert found.dtype == dtype
    assert found.shape == x.shape
    scale = float(expected.abs().max()) if expected.numel() else 0.0  # bfloat16 rounds what is summed
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype] * max(1.0, scale), rtol=TOLERANCE[dtype])


_LAYERS: dict[tuple[str, torch.dtype], nn.Module] = {}


def _cached_layer(family: str, dtype: torch.dtype) -> nn.Module:
    if (family, dtype) not in _LAYERS:
        torch.manual_seed(0)
        _LAYERS[family, dtype] = layer_of(family, dtype=dtype)
    return _LAYERS[family, dtype]


@pytest.mark.parametrize(("neurons", "hidden", "n"), [(15, 24, 3), (21, 72, 7), (6, 136, 2), (35, 8, 5)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sizes_that_no_vector_divides(neurons: int, hidden: int, n: int, dtype: torch.dtype) -> None:
    module = layer_of("olmoe", neurons, hidden, dtype)
    for tokens in (1, 3, 6):
        x = torch.randn(tokens, hidden).to(dtype)
        selection = random_selection(tokens, 3, n, int(module.num_experts), "few experts", tokens)
        with torch.no_grad():
            expected = EXECUTORS.create("reference").run(module, x, selection, n)
            found = EXECUTORS.create("cpu").run(module, x, selection, n)
        torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype] * 4, rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FAST)
def test_what_a_gate_computed_changes_nothing(name: str, family: str) -> None:
    module = _cached_layer(family, torch.float32)
    x = torch.randn(5, 32)
    index = torch.rand(5, int(module.num_experts)).argsort(dim=1)[:, :2]
    chosen = torch.rand(5, 2, 4) < 0.5
    selection = gather_selection(chosen, index, torch.rand(5, 2))
    computed = torch.zeros(5, 2, 4, 2)
    for t in range(5):
        for slot in range(2):
            computed[t, slot] = leading_activations(module, int(index[t, slot]), x[t : t + 1], 4, 2)[0]
    with torch.no_grad():
        plain = EXECUTORS.create("reference").run(module, x, selection, 4)
        found = EXECUTORS.create(name).run(module, x, selection, 4, computed)
    torch.testing.assert_close(found, plain, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_stays_alone(bad: float) -> None:
    module = _cached_layer("olmoe", torch.float32)
    x = torch.randn(6, 32)
    selection = random_selection(6, 2, 4, int(module.num_experts), "one expert", 3)
    with torch.no_grad():
        clean = EXECUTORS.create("cpu").run(module, x, selection, 4)
        x[2, 5] = bad
        expected = EXECUTORS.create("reference").run(module, x, selection, 4)
        found = EXECUTORS.create("cpu").run(module, x, selection, 4)
    others = torch.arange(6) != 2
    assert torch.equal(found[others], clean[others])
    assert not expected[2].isfinite().any()
    assert not found[2].isfinite().any()


def test_the_number_of_threads_changes_nothing() -> None:
    module = layer_of("olmoe", 64, 256)
    x = torch.randn(7, 256)
    selection = random_selection(7, 4, 4, int(module.num_experts), "random", 1)
    before = torch.get_num_threads()
    try:
        outputs = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outputs.append(EXECUTORS.create("cpu").run(module, x, selection, 4))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)


def test_threads_may_call_at_once() -> None:
    module = layer_of("olmoe", 64, 256)
    problems = [
        (torch.randn(4, 256), random_selection(4, 4, 4, int(module.num_experts), "random", s)) for s in range(8)
    ]
    cpu = EXECUTORS.create("cpu")
    expected = [cpu.run(module, x, selection, 4) for x, selection in problems]
    found: list[torch.Tensor | None] = [None] * 8

    def work(i: int) -> None:
        for _ in range(20):
            found[i] = cpu.run(module, *problems[i], 4)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for i in range(8):
        assert torch.equal(found[i], expected[i])


def test_a_forked_child_computes_the_same() -> None:
    module = layer_of("olmoe", 64, 256)
    x = torch.randn(4, 256)
    selection = random_selection(4, 4, 4, int(module.num_experts), "random", 5)
    cpu = EXECUTORS.create("cpu")
    expected = cpu.run(module, x, selection, 4)  # the parent has a pool now
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:  # no assertion, no pytest in the child
        torch.set_num_threads(1)  # torch's own pool does not survive a fork either
        found = cpu.run(module, x, selection, 4)
        os.write(write, b"same" if torch.allclose(found, expected, atol=1e-5) else b"other")
        os._exit(0)
    os.close(write)
    assert os.read(read, 8) == b"same"
    os.waitpid(pid, 0)


def test_packing_moves_nothing_but_memory() -> None:
    for family in FAMILIES:
        module = find_expert_layers(tiny_model(family))[0].module
        before = {name: value.clone() for name, value in module.named_parameters()}
        assert packed_rows(module) is None
        addresses = {name: value.data_ptr() for name, value in module.named_parameters()}
        pack(module)
        rows = packed_rows(module)
        assert rows is not None
        for name, value in module.named_parameters():
            assert torch.equal(value, before[name])
            assert value.data_ptr() == addresses[name]
        pack(module)  # twice is once
        assert torch.equal(packed_rows(module).down, rows.down)
        assert packed_rows(module.to(torch.bfloat16)) is not None  # a cast keeps it packed


@pytest.mark.parametrize(("avx512", "pairs"), [(False, False), (True, False), (True, True)])
def test_executors_are_chosen_by_what_they_run(avx512: bool, pairs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "has_avx512", lambda: avx512)
    monkeypatch.setattr(cpu, "has_products_of_pairs", lambda: pairs)
    large = {**MASKED_FROM, "neurons": MASKED_LARGE_NEURONS_FROM[avx512]}
    for dtype in (torch.float32, torch.bfloat16):
        # experts of the second layer do not stay in a core's cache, and suit products of pairs
        for neurons, hidden, crossovers in ((16, 32, MASKED_FROM), (512, 512, large)):
            layer, tokens = layer_of("olmoe", neurons, hidden, dtype=dtype), torch.randn(2, hidden, dtype=dtype)
            assert type(choose_executor("auto", layer, tokens, 4)).__name__ == "CpuExecutor"
            for what, most in crossovers.items():
                by_pairs = pairs and dtype == torch.bfloat16 and hidden == 512 and what != "experts"
                masked = (dtype == torch.float32 or avx512) and not by_pairs
                after = "MaskedExecutor" if masked else "CpuExecutor"
                for runs, name in ((most * layer.num_experts - 1, "CpuExecutor"), (most * layer.num_experts, after)):
                    assert type(choose_executor("auto", layer, tokens, runs, what, 4)).__name__ == name


@pytest.mark.skipif(not has_products_of_pairs(), reason="this CPU has no products of bfloat16 pairs (AVX512-BF16)")
@pytest.mark.parametrize("some", [False, True])
def test_many_tokens_in_bfloat16_run_by_products_of_pairs(some: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of("olmoe", 16, 64, dtype=torch.bfloat16), torch.randn(48, 64).bfloat16()
    runs: list[int] = []
    name = "neuron_pairs" if some else "gated_pairs"
    kernel = getattr(cpu, name)
    monkeypatch.setattr(cpu, name, lambda *given: (runs.append(len(given[2])), kernel(*given))[1])
    with torch.no_grad():
        for tokens in (48, 1):  # one has too few for it
            chosen = random_selection(tokens, 4, 2, layer.num_experts, "random", 1)
            if some:
                rule = NeuronRule(torch.rand(layer.num_experts, 16), torch.full((tokens,), 24))
                found, exact = (
                    EXECUTORS.create(executor).run_some(layer, x[:tokens], chosen, 2, rule).float()
                    for executor in ("cpu", "masked")
                )
            else:
                found, exact = (
                    EXECUTORS.create(executor).run(layer, x[:tokens], chosen, 2).float()
                    for executor in ("cpu", "reference")
                )
            assert (found - exact).abs().max() < 0.03 * exact.abs().max()
    assert runs == [48]


def test_executors_are_refused_clearly() -> None:
    module = _cached_layer("olmoe", torch.float32)
    x = torch.randn(2, 32)
    with pytest.raises(PrismError, match=r"'cpu' cannot run this layer: .*no_grad"):
        choose_executor("cpu", module, x.requires_grad_(), 4)
    assert type(choose_executor("auto", module, x, 4)).__name__ == "ReferenceExecutor"
    half = layer_of("olmoe", dtype=torch.float16)
    with pytest.raises(PrismError, match="bfloat16 and fp32 weights"):
        choose_executor("cpu", half, x.detach().half(), 4)
    with pytest.raises(PrismError, match=r"unknown executor 'fast'.*cpu"):
        choose_executor("fast", module, x, 4)

"""bfloat16 on a CPU with products of pairs: the plugin's experts lie in panels, once, and run at every budget there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests")

from vllm_live import ELASTIC, PROMPT, Reference, engine, generate, logprobs_of, made, tokens_of

from moe_prism import set_budget
from moe_prism.elastic.executors.panels import PANELS
from moe_prism.elastic.kernels.dots import has_products_of_pairs

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not has_products_of_pairs(), reason="this CPU has no products of bfloat16 pairs (AVX512-BF16)"),
]
FULL = 16
BFLOAT16: dict[str, Any] = {"dtype": "bfloat16", **ELASTIC}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("panels"))


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[Any]:
    with engine(checkpoint, **BFLOAT16) as found:
        yield found


def model_of(llm: Any) -> Any:
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()


def methods_of(llm: Any) -> list[Any]:
    return [layer.mlp.experts.routed_experts.quant_method for layer in model_of(llm).model.layers]


@pytest.fixture(scope="module")
def exact(checkpoint: Path) -> Any:
    """transformers' elastic model of the same values in fp32."""
    model = Reference(checkpoint).model
    for weight in model.parameters():
        weight.data.copy_(weight.data.bfloat16().float())
    return model


def routed(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made_ = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 64, generator=made_).bfloat16()
    weights, ids = torch.rand(tokens, 8, generator=made_).softmax(-1).topk(4)
    return x, weights, ids.int()


def test_weights_lie_in_panels_and_nowhere_else(llm: Any) -> None:
    for method in methods_of(llm):
        held, layer = method._held.experts, method._held.layer
        assert method._dial.executor == PANELS
        assert held.panels.gate_up.nbytes + held.panels.down.nbytes == 2 * held.num_experts * 3 * 128 * 64
        assert layer.w13_weight.numel() == layer.w2_weight.numel() == held.gate_up_proj.numel() == 0
        assert held.down_proj.device.type == "meta"


@pytest.mark.parametrize("budgets", [(1,), (5,), (15,), (16,), (1, 16, 9, 5, 16, 12)])
def test_a_layer_gives_what_reference_gives(llm: Any, exact: Any, budgets: tuple[int, ...]) -> None:
    for tokens in (6, 96):  # above 64 those at full budget run apart
        x, weights, ids = routed(tokens)
        each = torch.tensor(budgets).repeat(tokens)[:tokens]
        for method, layer in zip(methods_of(llm), exact.model.layers, strict=True):
            method._dial.fill(each)
            set_budget(exact, FULL)
            layer.mlp.experts.__dict__["_moe_prism"].dial.fill(each)
            with torch.inference_mode():
                found = method.run(x, weights, ids).float()
                expected = layer.mlp.experts(x.float(), ids.long(), weights)
            scale = expected.abs().max()
            torch.testing.assert_close(found / scale, expected / scale, atol=1.5e-2, rtol=0)
            method._dial.fill(None)
            layer.mlp.experts.__dict__["_moe_prism"].dial.fill(None)


def test_a_token_gets_bit_for_bit_what_it_gets_alone(llm: Any) -> None:
    x, weights, ids = routed(90)
    each = torch.tensor([1, 16, 9, 5, 16, 12]).repeat(15)
    method = methods_of(llm)[0]
    with torch.inference_mode():
        method._dial.fill(each)
        together = method.run(x, weights, ids)
        for t in range(12):
            one = slice(t, t + 1)
            method._dial.fill(None if each[t] == FULL else each[one])
            assert torch.equal(method.run(x[one], weights[one], ids[one]), together[one])
    method._dial.fill(None)


def test_full_budget_is_the_stock_engine_but_for_rounding(llm: Any, exact: Any, checkpoint: Path) -> None:
    ours = [logprobs_of(output)[0] for output in generate(llm, [None, {"k_active": 16}], n=1)]
    with engine(checkpoint.parent / "stock", dtype="bfloat16") as stock:
        (output,) = generate(stock, [None], n=1)
    set_budget(exact, FULL)
    with torch.no_grad():
        expected = exact(torch.tensor([PROMPT])).logits[0, -1].log_softmax(-1)[tokens_of([output])[0][0]]
    assert ours[0] == ours[1]
    for found in (ours[0], logprobs_of(output)[0]):
        assert (found - expected).abs() < 0.05


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"enforce_eager": False},
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    ],
)
def test_compiled_graphs_and_two_processes_give_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    path = made(tmp_path, num_sub_experts=2, compensation_budgets=2)
    asked = [{"k_active": k} for k in (1, 5, 8)]
    with engine(path, **BFLOAT16) as plain:
        expected = generate(plain, asked, n=1)
    with engine(path, **BFLOAT16, **options) as llm:
        found = generate(llm, asked, n=1)
        mixed = generate(llm, asked * 2, [PROMPT] * 6)
    for one, other in zip(found, expected, strict=True):
        # compiled graphs round elsewhere, in attention too
        torch.testing.assert_close(logprobs_of(one), logprobs_of(other), atol=0.1, rtol=0)
    assert tokens_of(mixed[:3]) == tokens_of(mixed[3:])

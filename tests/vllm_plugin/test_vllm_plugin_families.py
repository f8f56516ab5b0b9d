"""Every family and every kind of recipe in vLLM's engine, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests")

from transformers import AutoModelForCausalLM
from vllm_live import ELASTIC, PROMPT, Reference, engine, generate, logprobs_of, made, tokens_of

from moe_prism import set_budget
from moe_prism.refactor.export import export_fine_grained

pytestmark = [pytest.mark.timeout(300), pytest.mark.long]
OTHERS = ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"]
RECIPES: dict[str, dict[str, Any]] = {
    "proxy": {"gate": "proxy"},
    "linear": {"gate": "linear"},
    "probe": {"gate": "probe"},
    "compensated": {"compensation_budgets": 3},
    "scaled": {"compensation_budgets": 3, "recalibration": "scale"},
    "renormalised": {"recalibration": "renormalise"},
    "gate-first": {"solver": "importance", "neurons": "gate-first", "compensation_budgets": 3},
    "ladder": {"solver": "importance", "neurons": "gate-first", "shadow_bits": 4},
    "uneven layers": {"layer_budgets": "measured"},
    "narrow sub-experts": {"num_sub_experts": 16},
}


def agrees(path: Path, llm: Any, budgets: tuple[int, ...]) -> None:
    reference = Reference(path)
    outputs = generate(llm, [{"k_active": k} for k in budgets])
    for k_active, output in zip(budgets, outputs, strict=True):
        tokens, logprobs = reference.greedy(k_active)
        assert tokens_of([output]) == [tokens], k_active
        torch.testing.assert_close(logprobs_of(output), logprobs, atol=3e-5, rtol=0)


@pytest.mark.parametrize("family", OTHERS)
def test_a_family_gives_what_transformers_gives(family: str, tmp_path: Path) -> None:
    path = made(tmp_path, family, compensation_budgets=2, recalibration="scale")
    full = Reference(path).model.config.num_experts_per_tok * 4
    with engine(path, **ELASTIC) as llm:
        agrees(path, llm, (1, full // 2, full))


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_moe_layers_of_deepseek_give_what_transformers_gives(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layer by layer: at these tiny sizes stock vLLM's attention already differs from transformers'."""
    from vllm.forward_context import set_forward_context

    from moe_prism.vllm_plugin.experts import dial_of_model

    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")  # its kernel for latent attention on CPUs knows DeepSeek's sizes only
    path = made(tmp_path, family, compensation_budgets=2, recalibration="scale")
    reference = Reference(path).model
    full = reference.config.num_experts_per_tok * 4
    torch.manual_seed(0)
    x = torch.randn(9, 64)
    with engine(path, **ELASTIC) as llm:
        model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()
        dial = dial_of_model(model)
        for k_active in (1, full // 2, full - 1, full):
            dial.fill(torch.full((9,), k_active))
            set_budget(reference, k_active)
            for own, other in zip(model.model.layers, reference.model.layers, strict=True):
                with torch.inference_mode(), set_forward_context(None, llm.llm_engine.vllm_config, num_tokens=9):
                    found = own.mlp(x)
                    expected = other.mlp(x[None])[0]
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        dial.fill(None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_gives_what_transformers_gives(recipe: str, tmp_path: Path) -> None:
    path = made(tmp_path, **RECIPES[recipe])
    full = 4 * RECIPES[recipe].get("num_sub_experts", 4)
    with engine(path, **ELASTIC) as llm:
        agrees(path, llm, (1, full // 2, full))


def test_experts_kept_once_give_the_same(tmp_path: Path) -> None:
    path = made(tmp_path)
    with engine(path, **ELASTIC, additional_config={"moe_prism": {"save_memory": True}}) as llm:
        agrees(path, llm, (1, 9, 16))


@pytest.mark.parametrize("budgets", [(1, 9, 16), (16, 16, 16)])
def test_compiled_graphs_give_the_same(budgets: tuple[int, ...], tmp_path: Path) -> None:
    path = made(tmp_path)
    with engine(path, enforce_eager=False, **ELASTIC) as llm:
        agrees(path, llm, budgets)


@pytest.mark.parametrize("recalibration", ["mean", "scale", "renormalise"])
def test_two_tensor_parallel_processes_give_the_same(recalibration: str, tmp_path: Path) -> None:
    fitted = 0 if recalibration == "renormalise" else 3
    path = made(tmp_path, recalibration=recalibration, compensation_budgets=fitted)
    with engine(path, tensor_parallel_size=2, **ELASTIC) as llm:
        agrees(path, llm, (1, 9, 16))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"gate": "proxy"}, "reads the experts' weights"),
        ({"solver": "importance", "neurons": "gate-first"}, "chooses neurons"),
    ],
)
def test_what_cannot_be_split_is_refused(recipe: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = made(tmp_path, **recipe)
    with (
        pytest.raises(Exception, match=words),
        engine(path, tensor_parallel_size=2, distributed_executor_backend="mp", **ELASTIC),
    ):
        pass


@pytest.mark.parametrize("k_active", [None, 6])
def test_a_fine_grained_export_needs_no_plugin(k_active: int | None, tmp_path: Path) -> None:
    path = made(tmp_path, gate="linear")
    export_fine_grained(path, tmp_path / "fine", k_active)
    with engine(tmp_path / "fine") as stock:
        (output,) = generate(stock, [None])
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / ("stock" if k_active is None else "fine"), dtype=torch.float32
    )
    ids = torch.tensor([[*PROMPT, *tokens_of([output])[0]]])
    with torch.no_grad():
        logits = reference(ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    expected = logits.gather(1, ids[0, len(PROMPT) :, None])[:, 0]
    torch.testing.assert_close(logprobs_of(output), expected, atol=1e-5, rtol=0)

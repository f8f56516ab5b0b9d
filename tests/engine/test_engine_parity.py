"""Every request gets what transformers' ``generate`` gives it alone at its budget, whoever is in the batch with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_drive import alone, drain, engine_of, generation, tokens_of
from making import elastic_model, recipe
from tiny import FAMILIES, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_prism.elastic import attach, full_budget
from moe_prism.engine import TokenEvent
from moe_prism.refactor import refactor_model

ROOT = Path(__file__).parents[2]


def prompts(lengths: list[int], vocabulary: int = 96) -> list[list[int]]:
    return [tokens(1, length, seed, vocabulary)[0].tolist() for seed, length in enumerate(lengths)]


def assert_parity(
    model: PreTrainedModel, given: list[list[int]], count: int, budgets: list[int], **limits: Any
) -> None:
    engine = engine_of(model, **limits)
    for number, (prompt, k) in enumerate(zip(given, budgets, strict=True)):
        engine.submit(generation(str(number), prompt, count, k))
    events = drain(engine)
    for number, (prompt, k) in enumerate(zip(given, budgets, strict=True)):
        mine = [event for event in events[str(number)] if isinstance(event, TokenEvent)]
        expected, logprobs = alone(model, prompt, count, k)
        assert tokens_of(events[str(number)]) == expected
        assert [event.budget for event in mine] == [k] * count
        assert [event.logprob for event in mine] == pytest.approx(logprobs, abs=2e-4)
        assert [event.top[0] for event in mine] == [(event.token, event.logprob) for event in mine]
        assert [event.finished for event in mine] == [None] * (count - 1) + ["length"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_mixed_budgets_in_one_batch(family: str, tmp_path: Path) -> None:
    model = elastic_model(family, tmp_path)
    full = full_budget(model)
    assert_parity(model, prompts([5, 12, 1, 9, 3]), 6, [full, 2, full // 2, 1, full - 1])


def test_everyone_at_full_budget(tmp_path: Path) -> None:
    model = elastic_model("qwen3_moe", tmp_path)
    full = full_budget(model)
    assert_parity(model, prompts([5, 12, 7]), 6, [full] * 3)


@pytest.mark.parametrize("pieces", [1, 3, 7])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss"])
def test_prompts_in_pieces(family: str, pieces: int, tmp_path: Path) -> None:
    model = elastic_model(family, tmp_path)
    assert_parity(model, prompts([5, 12, 20]), 4, [3, 1, 4], max_prefill=pieces)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_sliding_windows(family: str, tmp_path: Path) -> None:
    model = elastic_model(family, tmp_path)
    model.config.sliding_window = 4
    for module in model.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = 4  # type: ignore[assignment]
    assert_parity(model, prompts([3, 13, 8]), 6, [2, 3, 1], max_prefill=5)


def test_neurons_within_sub_experts(tmp_path: Path) -> None:
    model = elastic_model("olmoe", tmp_path, neurons="gate-first")
    assert_parity(model, prompts([5, 12, 7]), 6, [2, 16, 5], max_prefill=8)


def test_reference_model(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(ROOT / "models/reference", dtype=torch.float32).eval()
    done, work = refactor_model(model, None, recipe(context=128), tmp_path / "out")
    work.remove()
    attach(model, done.elastic, done.tensors)
    assert_parity(model, prompts([70, 12, 33, 1], 4096), 12, [16, 4, 9, 1], max_prefill=40, memory_tokens=300)
    # a long prompt at full budget takes the model's own path beside the others
    assert_parity(model, prompts([70, 12, 33], 4096), 4, [16, 4, 9])


def test_generate_works_beside_an_engine(tmp_path: Path) -> None:
    model = elastic_model("olmoe", tmp_path)
    before = alone(model, prompts([6])[0], 5, 2)
    engine = engine_of(model)
    engine.submit(generation("a", prompts([9])[0], 8, 3))
    engine.step()
    assert alone(model, prompts([6])[0], 5, 2) == before
    assert tokens_of(drain(engine)["a"]) == alone(model, prompts([9])[0], 8, 3)[0][1:]

"""Engines of several processes that exchange tokens, against transformers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests")

from vllm_live import ELASTIC, OPTIONS, PROMPT, Reference, engine, generate, logprobs_of, made, tokens_of

pytestmark = [pytest.mark.timeout(600), pytest.mark.long]


class Ask(NamedTuple):
    rank: int
    k_active: int
    prompt: list[int]
    tokens: int = 12


# ranks with unequal work: prompts of different lengths, one that ends early, so that its rank idles for a while
MIXED = [
    Ask(0, 16, PROMPT),
    Ask(0, 3, [*PROMPT[2:], 7]),
    Ask(0, 9, PROMPT[::-1] * 3),
    Ask(1, 5, [11, *PROMPT], 5),
    Ask(1, 12, PROMPT[4:], 3),
]
ALONE = [Ask(0, 7, PROMPT), Ask(1, 2, PROMPT)]
FULL = [Ask(0, 16, PROMPT), Ask(1, 16, PROMPT[1:])]


def data_parallel(path: Path, rounds: list[list[Ask]], **more: Any) -> list[list[Any]]:
    """The outputs of requests that are sent together, round by round, to two ranks of one server."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    async def one(llm: Any, ask: Ask, name: str) -> Any:
        params = SamplingParams(
            max_tokens=ask.tokens, temperature=0, logprobs=1, ignore_eos=True, extra_args={"k_active": ask.k_active}
        )
        prompt = {"prompt_token_ids": ask.prompt}
        answers = llm.generate(prompt, params, name, data_parallel_rank=ask.rank)
        return [answer async for answer in answers][-1]

    async def run() -> list[list[Any]]:
        llm = AsyncLLM.from_engine_args(AsyncEngineArgs(str(path), **{**OPTIONS, "data_parallel_size": 2, **more}))
        try:
            found = []
            for number, asks in enumerate(rounds):
                waiting = [one(llm, ask, f"{number}-{i}") for i, ask in enumerate(asks)]
                found.append(list(await asyncio.gather(*waiting)))
            return found
        finally:
            llm.shutdown()

    return asyncio.run(run())


def agrees(path: Path, rounds: list[list[Ask]], **more: Any) -> None:
    reference = Reference(path)
    for asks, outputs in zip(rounds, data_parallel(path, rounds, **more), strict=True):
        for ask, output in zip(asks, outputs, strict=True):
            tokens, logprobs = reference.greedy(ask.k_active, ask.tokens, ask.prompt)
            assert tokens_of([output]) == [tokens], ask
            torch.testing.assert_close(logprobs_of(output), logprobs, atol=3e-5, rtol=0)
            assert output.kv_transfer_params["moe_prism"]["mean_k_active"] == ask.k_active


RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"gate": "linear"},
    "compensated": {"compensation_budgets": 3, "recalibration": "mean"},
    "uneven layers, other kernels": {"layer_budgets": "measured", "num_sub_experts": 16},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_data_parallel_ranks_give_each_request_what_it_gets_alone(recipe: str, tmp_path: Path) -> None:
    path = made(tmp_path, **RECIPES[recipe])
    scale = RECIPES[recipe].get("num_sub_experts", 4) // 4
    rounds = [[ask._replace(k_active=ask.k_active * scale) for ask in asks] for asks in (MIXED, ALONE[:1], FULL, ALONE)]
    agrees(path, rounds, **ELASTIC)


def test_shared_experts_stay_with_their_tokens(tmp_path: Path) -> None:
    path = made(tmp_path, "qwen2_moe", compensation_budgets=2, recalibration="scale")
    full = Reference(path).model.config.num_experts_per_tok * 4
    agrees(path, [[ask._replace(k_active=min(ask.k_active, full)) for ask in MIXED]], **ELASTIC)


def test_compiled_graphs_exchange_the_same(tmp_path: Path) -> None:
    agrees(made(tmp_path), [MIXED, ALONE[:1], FULL], enforce_eager=False, **ELASTIC)


def test_data_and_expert_parallel_ranks_give_the_same(tmp_path: Path) -> None:
    options = {"weighted": False, "reweights": True}
    path = made(tmp_path, gate="linear", gate_options=options, compensation_budgets=3)
    agrees(path, [MIXED, ALONE[:1], FULL], enable_expert_parallel=True, **ELASTIC)


@pytest.mark.parametrize("recalibration", ["scale", "renormalise"])
def test_two_expert_parallel_processes_give_the_same(recalibration: str, tmp_path: Path) -> None:
    fitted = 0 if recalibration == "renormalise" else 3
    path = made(tmp_path, recalibration=recalibration, compensation_budgets=fitted)
    reference = Reference(path)
    budgets = (1, 9, 16)
    with engine(path, tensor_parallel_size=2, enable_expert_parallel=True, **ELASTIC) as llm:
        outputs = generate(llm, [{"k_active": k} for k in budgets])
    for k_active, output in zip(budgets, outputs, strict=True):
        tokens, logprobs = reference.greedy(k_active)
        assert tokens_of([output]) == [tokens], k_active
        torch.testing.assert_close(logprobs_of(output), logprobs, atol=3e-5, rtol=0)

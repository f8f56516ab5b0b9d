"""The plugin in vLLM's own engine, offline; `make test-vllm` has the environment for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests")

from scheduling_costs import expensive
from vllm_live import ELASTIC, PROMPT, Reference, engine, generate, logprobs_of, made, tokens_of

from moe_prism.checkpoint.read import open_checkpoint
from moe_prism.scheduling import CostModel
from moe_prism.scheduling.cost_file import write_cost_model

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[Any]:
    with engine(checkpoint, **ELASTIC) as found:
        yield found


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.mark.parametrize("k_active", [1, 5, 9, 15, 16])
def test_a_budget_gives_what_transformers_gives(llm: Any, reference: Reference, k_active: int) -> None:
    (output,) = generate(llm, [{"k_active": k_active}])
    tokens, logprobs = reference.greedy(k_active)
    assert tokens_of([output]) == [tokens]
    torch.testing.assert_close(logprobs_of(output), logprobs, atol=2e-5, rtol=0)


def test_budgets_differ(llm: Any) -> None:
    found = [logprobs_of(output) for output in generate(llm, [{"k_active": k} for k in (1, 5, 16)])]
    assert (found[0] - found[2]).abs().max() > 1e-3
    assert (found[1] - found[2]).abs().max() > 1e-3


@pytest.mark.parametrize("longer", [1, 7])
def test_mixed_budgets_in_one_batch_are_each_alone(llm: Any, longer: int) -> None:
    budgets = [1, 16, 9, 5, 16, 12]
    prompts = [(PROMPT[i:] + PROMPT[:i]) * longer for i in range(len(budgets))]
    llm.reset_prefix_cache()
    alone = [generate(llm, [{"k_active": k}], [p])[0] for k, p in zip(budgets, prompts, strict=True)]
    together = generate(llm, [{"k_active": k} for k in budgets], prompts)
    assert tokens_of(together) == tokens_of(alone)
    for mine, other in zip(together, alone, strict=True):
        torch.testing.assert_close(logprobs_of(mine), logprobs_of(other), atol=2e-5, rtol=0)


def test_the_reply_says_the_mean_budget(llm: Any) -> None:
    found = generate(llm, [{"k_active": 9}, None, {"k_min": 3}])
    means = [output.kv_transfer_params["moe_prism"]["mean_k_active"] for output in found]
    assert means == [9, 16, 16]  # without a cost model nobody gets less than he wants


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"k_active": 17}, "k_active must be from 1 to 16"),
        ({"k_active": "9"}, "whole number"),
        ({"k_min": 9, "k_active": 4}, "k_min must be from 1 to k_active = 4"),
        ({"ttft_ms": -1}, "ttft_ms must be above 0"),
    ],
)
def test_impossible_arguments_do_not_reach_the_engine(llm: Any, asked: dict[str, Any], words: str) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=words):
        generate(llm, [asked])
    assert len(tokens_of(generate(llm, [{"k_active": 4}]))[0]) == 12


def test_prefixes_are_shared_within_a_class_of_quality_only(llm: Any) -> None:
    llm.reset_prefix_cache()
    long = [(7 * i) % 90 + 3 for i in range(70)]
    expected = {k: tokens_of(generate(llm, [{"k_active": k}], [long]))[0] for k in (16, 2)}
    llm.reset_prefix_cache()

    def hits(**asked: int) -> int:
        (output,) = generate(llm, [asked], [long])
        if "k_active" in asked:
            assert tokens_of([output]) == [expected[asked["k_active"]]]
        return int(output.num_cached_tokens)

    assert hits(k_active=2) == 0
    assert hits(k_active=2) > 0  # caching works
    assert hits(k_active=16) == 0  # what a low budget computed serves no higher floor
    assert hits(k_active=16) > 0
    assert hits(k_min=2) == 0  # nor a request that only may fall so low
    assert hits(k_min=16) > 0  # the same class as full budget


# From here on engines come and go: what ends with one of them ends for all of this process.


def test_full_budget_is_the_stock_engine(llm: Any, checkpoint: Path) -> None:
    ours = generate(llm, [None, {"k_active": 16}])
    with engine(checkpoint.parent / "stock") as stock:
        (theirs,) = generate(stock, [None])
    for output in ours:
        assert tokens_of([output]) == tokens_of([theirs])
        torch.testing.assert_close(logprobs_of(output), logprobs_of(theirs), atol=2e-5, rtol=0)


def test_without_the_flags_the_checkpoint_is_the_original(checkpoint: Path) -> None:
    from vllm.exceptions import VLLMValidationError

    with engine(checkpoint) as plain:
        with pytest.raises(VLLMValidationError, match="this server has no budgets"):
            generate(plain, [{"k_active": 4}])
        assert len(tokens_of(generate(plain, [None]))[0]) == 12


@pytest.mark.parametrize("half", ["worker_cls", "scheduler_cls"])
def test_half_of_the_plugin_is_refused(checkpoint: Path, half: str) -> None:
    with (
        pytest.raises(Exception, match="only one half of the plugin is on"),
        engine(checkpoint, **{half: ELASTIC[half]}),
    ):
        pass


def test_a_stock_model_has_no_budgets(checkpoint: Path) -> None:
    with pytest.raises(Exception, match="is a stock model"), engine(checkpoint.parent / "stock", **ELASTIC):
        pass


def cost_model(path: Path, **changes: Any) -> CostModel:
    """One in which a token at full budget takes 20 ms, of which 16 are in proportion to its budget."""
    from moe_prism.vllm_plugin.costs import engine_name, machine_name

    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.float32), device_config=SimpleNamespace(device_type="cpu")
    )
    identity = {
        "engine": engine_name(),
        "machine": machine_name(config),
        "checkpoint": open_checkpoint(path).fingerprint(),
    }
    return replace(expensive(), **{**identity, **changes})


def test_under_load_budgets_fall_and_floors_hold(checkpoint: Path, tmp_path: Path) -> None:
    write_cost_model(tmp_path / "cost.json", cost_model(checkpoint))
    options = {"cost_model": str(tmp_path / "cost.json")}
    with engine(checkpoint, max_num_seqs=4, additional_config={"moe_prism": options}, **ELASTIC) as llm:
        crowd = generate(llm, [{"k_min": 3, "tpot_ms": 30}, {"k_min": 12, "tpot_ms": 30}] * 6)
        (alone,) = generate(llm, [{"k_min": 3, "tpot_ms": 1000}])
    means = [output.kv_transfer_params["moe_prism"]["mean_k_active"] for output in crowd]
    assert min(means[::2]) >= 3
    assert min(means[1::2]) >= 12
    assert sum(means[::2]) < 6 * 10
    assert alone.kv_transfer_params["moe_prism"]["mean_k_active"] > 13


def test_a_cost_model_of_another_engine_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    write_cost_model(tmp_path / "cost.json", cost_model(checkpoint, engine="embedded"))
    options = {"moe_prism": {"cost_model": str(tmp_path / "cost.json")}}
    with (
        pytest.raises(Exception, match="measured for engine 'embedded'"),
        engine(checkpoint, additional_config=options, **ELASTIC),
    ):
        pass

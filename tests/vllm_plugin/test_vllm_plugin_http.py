"""`vllm serve --config FILE`, asked by the OpenAI client."""

from __future__ import annotations

import os
import re
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests")

import openai
from typer.testing import CliRunner
from vllm_live import PROMPT, Reference, made

from moe_prism.cli.app import app

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("http"))


@contextmanager
def served(checkpoint: Path, config: Path, *more: str) -> Iterator[str]:
    """The address of a server with budgets."""
    done = CliRunner().invoke(app, ["vllm-config", str(checkpoint), "--out", str(config)])
    assert done.exit_code == 0, done.output
    from vllm_bench.server import serving  # found by the path that vllm_live adds

    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "96"]
    options += ["--kv-cache-memory-bytes", str(1 << 24)]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with serving(config, [*options, *more], environment) as found:
        yield found


@pytest.fixture(scope="module")
def address(checkpoint: Path) -> Iterator[str]:
    with served(checkpoint, checkpoint.parent / "vllm.yaml") as found:
        yield found


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none")


def ask(client: openai.OpenAI, **xargs: Any) -> Any:
    return client.completions.create(
        model="elastic",
        prompt=PROMPT,
        max_tokens=12,
        temperature=0,
        extra_body={"vllm_xargs": xargs, "ignore_eos": True, "return_token_ids": True},
    )


@pytest.mark.parametrize("k_active", [4, 16])
def test_a_request_gets_its_budget(client: openai.OpenAI, checkpoint: Path, k_active: int) -> None:
    reply = ask(client, k_active=k_active)
    tokens, _ = Reference(checkpoint).greedy(k_active)
    assert reply.choices[0].token_ids == tokens
    assert reply.kv_transfer_params["moe_prism"] == {"mean_k_active": k_active}


@pytest.mark.parametrize(
    ("xargs", "words"),
    [
        ({"k_active": 17}, "k_active must be from 1 to 16 (full budget), got 17"),
        ({"k_min": "low"}, "k_min must be a whole number"),
        ({"k_min": 9, "k_active": 4}, "k_min must be from 1 to k_active = 4"),
    ],
)
def test_impossible_arguments_get_a_400(client: openai.OpenAI, xargs: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **xargs)
    assert words in str(caught.value)
    assert ask(client, k_active=9).kv_transfer_params["moe_prism"]["mean_k_active"] == 9  # the engine lives


@pytest.mark.long
def test_two_data_parallel_ranks_in_one_server(checkpoint: Path, tmp_path: Path) -> None:
    reference = Reference(checkpoint)
    with served(checkpoint, tmp_path / "vllm.yaml", "--data-parallel-size", "2") as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")

        def one(number: int) -> Any:
            rank, k_active = divmod(number, 4)
            header = {"X-data-parallel-rank": str(rank)}
            return ask(client.with_options(default_headers=header), k_active=4 * k_active + 3)

        with ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(one, range(8)))
        for number, reply in enumerate(replies):
            k_active = 4 * (number % 4) + 3
            assert reply.choices[0].token_ids == reference.greedy(k_active)[0]
            assert reply.kv_transfer_params["moe_prism"] == {"mean_k_active": k_active}
        with urllib.request.urlopen(f"{address}/metrics") as answer:
            text = answer.read().decode()
    for rank in (0, 1):
        assert re.search(rf'^moe_prism:token_k_active_count\{{engine="{rank}",.*\}} [1-9]', text, re.MULTILINE)


def test_metrics_count_budgets_floors_and_degradations(client: openai.OpenAI, address: str) -> None:
    def value(name: str) -> float:
        with urllib.request.urlopen(f"{address}/metrics") as reply:
            lines = [line for line in reply.read().decode().splitlines() if line.startswith(f"moe_prism:{name}")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    before = value("token_k_active_sum"), value("token_k_min_sum"), value("token_k_active_count")
    ask(client, k_active=9)
    ask(client, k_active=9)  # what the last step counts crosses over with the next one
    for _ in range(40):
        if value("token_k_active_count") >= before[2] + 12:
            break
        time.sleep(0.1)
    tokens = value("token_k_active_count") - before[2]
    assert tokens >= 12
    assert value("token_k_active_sum") - before[0] == 9 * tokens
    assert value("token_k_min_sum") - before[1] == 9 * tokens
    assert value("degraded_tokens_total") == 0
    assert value("floor_violations_total") == 0

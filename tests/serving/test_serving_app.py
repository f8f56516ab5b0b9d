"""Every bad input of a request, through the official client or as raw bytes; and the small routes."""

from __future__ import annotations

import json
from pathlib import Path

import httpx2
import pytest
from openai import BadRequestError, NotFoundError
from serving_live import NAME, Live, live_server

from moe_prism.errors import PrismError
from moe_prism.serving.app import ServerLimits

BAD = {
    "k_min 17": ({"vllm_xargs": {"k_min": 17}}, "vllm_xargs.k_min", "from 1 to 16"),
    "k_min 0": ({"vllm_xargs": {"k_min": 0}}, "vllm_xargs.k_min", "from 1 to 16"),
    "k_active 99": ({"vllm_xargs": {"k_active": 99}}, "vllm_xargs.k_active", "from 1 to 16"),
    "k_min over k_active": ({"vllm_xargs": {"k_min": 9, "k_active": 8}}, "vllm_xargs.k_min", "from 1 to k_active = 8"),
    "k_min text": ({"vllm_xargs": {"k_min": "9"}}, "vllm_xargs.k_min", "1 or more; got '9'"),
    "k_min half": ({"vllm_xargs": {"k_min": 9.5}}, "vllm_xargs.k_min", "got '9.5'"),
    "ttft_ms 0": ({"vllm_xargs": {"ttft_ms": 0}}, "vllm_xargs.ttft_ms", "above 0"),
    "tpot_ms -1": ({"vllm_xargs": {"tpot_ms": -1}}, "vllm_xargs.tpot_ms", "above 0"),
    "unknown quality": ({"vllm_xargs": {"k_mni": 9}}, "vllm_xargs.k_mni", "unknown field"),
    "unknown field": ({"temprature": 1}, "temprature", "unknown field"),
    "temperature 3": ({"temperature": 3}, "temperature", "from 0 to 2"),
    "temperature text": ({"temperature": "hot"}, "temperature", "from 0 to 2"),
    "top_p 0": ({"top_p": 0}, "top_p", "above 0 to 1"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens", "1 or more"),
    "max_tokens over the context": ({"max_tokens": 1024}, "prompt", "context of 1024 tokens"),
    "n 65": ({"n": 65}, "n", "from 1 to 64"),
    "n times prompts": ({"n": 40, "prompt": ["the", "sea"]}, "n", "more than 64"),
    "logprobs 21": ({"logprobs": 21}, "logprobs", "from 0 to 20"),
    "stop empty": ({"stop": ""}, "stop", "1 to 200 characters"),
    "stop many": ({"stop": ["a"] * 17}, "stop", "up to 16"),
    "seed": ({"seed": 2**63}, "seed", "from -9223372036854775808"),
    "priority": ({"priority": "high"}, "priority", "from -2147483648"),
    "prompt missing": ({"prompt": None}, "prompt", "a text, a list of token ids"),
    "prompt empty": ({"prompt": ""}, "prompt", "a text"),
    "prompt no tokens": ({"prompt": []}, "prompt", "a list of token ids"),
    "token id": ({"prompt": [3, 96]}, "prompt", "from 0 to 95"),
    "token id negative": ({"prompt": [-1]}, "prompt", "a list of token ids"),
    "prompt too long": ({"prompt": [5] * 1020}, "prompt", "has 1020 tokens"),
    "echo": ({"echo": True}, "echo", "False only"),
    "presence_penalty": ({"presence_penalty": 0.5}, "presence_penalty", "0 only"),
    "stream text": ({"stream": "yes"}, "stream", "boolean"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_value_is_answered_400_with_the_allowed_range(case: str, server: Live) -> None:
    changes, param, message = BAD[case]
    before = server.engine.stats.steps
    with pytest.raises(BadRequestError) as refused:
        server.client().post("/completions", cast_to=object, body={"model": NAME, "prompt": "the sea", **changes})
    assert message in refused.value.message
    assert refused.value.param == param
    assert refused.value.type == "invalid_request_error"
    assert server.engine.stats.steps == before, "work was done for a request that could not be served"


BAD_CHATS = {
    "no messages": ({"messages": []}, "messages", "at least one"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "system, developer, user, assistant"),
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "a text"),
    "top_logprobs": ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "at most 0"),
    "format": ({"response_format": {"type": "json_object"}}, "response_format.type", "text"),
    "too long": ({"max_completion_tokens": 2000}, "messages", "context of 1024"),
}


@pytest.mark.parametrize("case", BAD_CHATS)
def test_a_bad_chat_is_answered_400(case: str, server: Live) -> None:
    changes, param, message = BAD_CHATS[case]
    body = {"model": NAME, "messages": [{"role": "user", "content": "the sea"}], **changes}
    with pytest.raises(BadRequestError) as refused:
        server.client().post("/chat/completions", cast_to=object, body=body)
    assert message in refused.value.message
    assert refused.value.param == param


@pytest.mark.parametrize("neutral", [
    {"frequency_penalty": 0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0},
    {"best_of": 1, "echo": False, "suffix": None, "logit_bias": {}, "user": "somebody", "stop": None, "n": None},
    {"stream_options": None, "max_tokens": None, "temperature": None, "top_p": None, "seed": None},
])  # fmt: skip
def test_fields_that_change_nothing_are_accepted(neutral: dict, server: Live) -> None:
    body = {"model": NAME, "prompt": "the sea", "max_tokens": 1, **neutral}
    assert httpx2.post(f"{server.url}/v1/completions", json=body).status_code == 200


def test_an_unknown_model_is_answered_404_with_the_name_of_the_served_one(server: Live) -> None:
    client = server.client()
    with pytest.raises(NotFoundError, match="'tiny'") as refused:
        client.completions.create(model="gpt-5", prompt="a")
    assert refused.value.code == "model_not_found"
    with pytest.raises(NotFoundError, match="'tiny'"):
        client.models.retrieve("gpt-5")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"model": NaN}', b'{"a": 1e999}']
)
def test_malformed_bodies_are_answered_400(body: bytes, server: Live) -> None:
    reply = httpx2.post(f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert reply.status_code == 400
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_unknown_paths_and_methods_have_the_same_shape(server: Live) -> None:
    for method, path, status in (("GET", "/v2", 404), ("PUT", "/v1/completions", 405), ("POST", "/health", 405)):
        reply = httpx2.request(method, server.url + path)
        assert reply.status_code == status
        assert reply.json()["error"]["type"] == "invalid_request_error"


def test_small_routes(server: Live) -> None:
    card = server.client().models.list().data[0]
    assert (card.id, card.full_budget, card.max_model_len, card.default_k_min) == (NAME, 16, 1024, 4)
    assert server.client().models.retrieve(NAME) == card
    points = httpx2.get(f"{server.url}/v1/operating_points").json()
    assert points == {"full_budget": 16, "named": {"full": 16}, "measured": None}
    assert httpx2.get(f"{server.url}/health").json() == {"status": "ok"}
    assert httpx2.get(f"{server.url}/ready").json() == {"status": "ready"}


def test_measured_points_are_served_as_the_checkpoint_has_them(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    from moe_prism.checkpoint.schema import OPERATING_POINTS_FILE, parse_operating_points

    point = {"share": 1.0, "nll": 1.0, "ppl": 2.718281828, "kl": 0.0, "top1_agreement": 1.0, "distinct": True,
             "stable": None, "k_active": 16, "flops_share": 1.0, "bytes_share": 1.0}  # fmt: skip
    record = {"full_budget": 16, "text": "t", "tokens": 9, "seed": 0, "versions": {}, "machine": {}, "elastic": [point],
              "distinct_stable": {}, "full_budget_max_logit_diff": None}  # fmt: skip
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    (copy / OPERATING_POINTS_FILE).write_text(json.dumps(record | {"version": 1}))
    with live_server(copy) as live:
        found = httpx2.get(f"{live.url}/v1/operating_points").json()
    assert parse_operating_points(json.dumps(found["measured"])) == parse_operating_points(
        (copy / OPERATING_POINTS_FILE).read_bytes()
    )
    assert found["named"] == {"full": 16, "high": 16, "medium": 16, "low": 16}


@pytest.mark.parametrize("bad", [{"max_waiting": 0}, {"max_body": -1}, {"drain_seconds": 0}, {"api_key": ""}])
def test_impossible_limits_are_refused(bad: dict) -> None:
    with pytest.raises(PrismError):
        ServerLimits(**bad)

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from openai import AuthenticationError
from serving_live import NAME, Live, live_server

from moe_prism.serving.app import ServerLimits

KEY = "sk-tiny-secret"


@pytest.fixture(scope="module")
def guarded(checkpoint: Path) -> Iterator[Live]:
    with live_server(checkpoint, ServerLimits(api_key=KEY, max_body=2000)) as live:
        yield live


def test_only_the_right_key_opens_the_api(guarded: Live) -> None:
    assert guarded.client(api_key=KEY).models.list().data[0].id == NAME
    for wrong in ("none", KEY[:-1], KEY + "x", KEY.upper()):
        with pytest.raises(AuthenticationError) as refused:
            guarded.client(api_key=wrong).completions.create(model=NAME, prompt="the sea")
        assert refused.value.type == "authentication_error"
    for headers in ({}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"}, {"authorization": b"Bearer \xff"}):
        assert httpx2.get(f"{guarded.url}/v1/models", headers=headers).status_code == 401


def test_health_metrics_and_page_need_no_key(guarded: Live) -> None:
    for path in ("/", "/health", "/ready", "/metrics", "/openapi.json"):
        assert httpx2.get(guarded.url + path).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_answered_413(chunked: bool, guarded: Live) -> None:
    big = b'{"model": "tiny", "prompt": "' + b"a" * 3000 + b'"}'
    content = iter([big[:1500], big[1500:]]) if chunked else big
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    reply = httpx2.post(f"{guarded.url}/v1/completions", content=content, headers=headers)
    assert reply.status_code == 413
    assert "2000 bytes" in reply.json()["error"]["message"]
    small = {"model": NAME, "prompt": "the sea", "max_tokens": 1}
    assert httpx2.post(f"{guarded.url}/v1/completions", json=small, headers=headers).status_code == 200

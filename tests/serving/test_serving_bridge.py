"""Clients that go away, a full queue, draining, and an engine whose step raises."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import threading
from pathlib import Path

import httpx2
import pytest
from openai import APIStatusError, InternalServerError, RateLimitError
from serving_live import NAME, OPTIONS, Live, live_server, until

from moe_prism.serving.app import ServerLimits

LONG = {"model": NAME, "prompt": "the sea", "max_tokens": 900, "extra_body": {"ignore_eos": True}}


def steps_until_gone(live: Live) -> int:
    """Steps that the engine still makes once it has nothing to run but what was cancelled."""
    before = live.engine.stats.steps
    until(lambda: not live.bridge._open)
    until(lambda: not live.engine._running and not live.engine._waiting)
    return live.engine.stats.steps - before


def raw_request(url: str, stream: bool) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    extra = LONG["extra_body"]
    body = json.dumps({k: v for k, v in LONG.items() if k != "extra_body"} | extra | {"stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    connection.sendall(f"{head}\r\n\r\n".encode() + body)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_place_within_a_step(stream: bool, checkpoint: Path) -> None:
    """The steps are slowed down, so that one step more is longer than the event loop needs to notice."""
    import time

    def slow(engine) -> None:
        run = engine._runner.forward

        def forward(*args, **kwargs):
            time.sleep(0.2)
            return run(*args, **kwargs)

        engine._runner.forward = forward

    with live_server(checkpoint, change=slow) as live:
        connection = raw_request(live.url, stream)
        until(lambda: live.engine.stats.running == 1 and live.engine.stats.tokens > 6)  # 3 were the warm-up's
        assert live.engine._memory.used > 0
        connection.close()
        before = live.engine.stats.steps
        until(lambda: not live.engine._running)
        # the step that ran when it went, and one that may have begun before the event loop looked
        assert live.engine.stats.steps - before <= 2
        assert live.engine._memory.used == 0
        assert not live.bridge._open


def test_a_full_queue_is_answered_429_with_the_time_to_wait(checkpoint: Path) -> None:
    options = dataclasses.replace(OPTIONS, max_running=1)
    with live_server(checkpoint, ServerLimits(max_waiting=2), options) as live:
        client = live.client()
        streams = [client.completions.create(**LONG, stream=True)]
        next(streams[0])
        waiting = [threading.Thread(target=lambda: client.completions.create(**LONG | {"max_tokens": 1})) for _ in "ab"]
        for thread in waiting:
            thread.start()
        until(lambda: live.bridge._waiting() == 2)
        with pytest.raises(RateLimitError, match="queue holds 2") as refused:
            client.completions.create(**LONG)
        assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
        assert refused.value.code == "queue_full"
        streams[0].close()
        for thread in waiting:
            thread.join(20)
        assert client.completions.create(**LONG | {"max_tokens": 2}).usage.completion_tokens == 2
        assert 'rejected_requests_total{model_name="tiny"} 1.0' in httpx2.get(f"{live.url}/metrics").text


def test_draining_finishes_what_runs_and_refuses_what_is_new(checkpoint: Path) -> None:
    with live_server(checkpoint) as live:
        client = live.client()
        stream = client.completions.create(**LONG | {"max_tokens": 300}, stream=True)
        next(stream)
        drained = asyncio.run_coroutine_threadsafe(live.bridge.drain(60), live.bridge._loop)
        until(lambda: not live.bridge.ready)
        with pytest.raises(InternalServerError, match="shutting down") as refused:
            client.completions.create(**LONG)
        assert refused.value.status_code == 503
        assert "retry-after" in refused.value.response.headers
        assert httpx2.get(f"{live.url}/ready").status_code == 503
        assert httpx2.get(f"{live.url}/health").status_code == 200
        assert list(stream)[-1].choices[0].finish_reason == "length"
        drained.result(20)


def test_draining_has_an_end(checkpoint: Path) -> None:
    with live_server(checkpoint) as live:
        stream = live.client().completions.create(**LONG, stream=True)
        next(stream)
        asyncio.run_coroutine_threadsafe(live.bridge.drain(0.05), live.bridge._loop).result(20)
        with pytest.raises(Exception, match="shutting down"):
            list(stream)
        until(lambda: not live.engine._running)


def test_a_step_that_raises_fails_its_requests_only(checkpoint: Path) -> None:
    broken = {"left": 0}

    def faulty(engine) -> None:
        step = engine.step

        def once():
            if broken["left"]:
                broken["left"] -= 1
                raise MemoryError("no memory for this step")
            return step()

        engine.step = once

    with live_server(checkpoint, change=faulty) as live:
        client = live.client()
        stream = client.completions.create(**LONG, stream=True)
        next(stream)
        broken["left"] = 1
        with pytest.raises(Exception, match="no memory for this step"):
            list(stream)
        reply = client.completions.create(**LONG | {"max_tokens": 5})
        assert reply.usage.completion_tokens == 5
        assert httpx2.get(f"{live.url}/health").status_code == 200
        assert not live.bridge._open


def test_choices_of_one_request_are_accepted_or_refused_together(checkpoint: Path) -> None:
    options = dataclasses.replace(OPTIONS, memory_tokens=600)
    with live_server(checkpoint, options=options) as live:
        with pytest.raises(APIStatusError, match="context of 600 tokens"):
            live.client().completions.create(**LONG | {"n": 3})
        assert not live.bridge._open

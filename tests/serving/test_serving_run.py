"""The command in a process of its own: signals, a kill and a restart, and bad input."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from openai import APIConnectionError, APIStatusError, OpenAI
from serving_live import NAME, ROOT, served, until

from moe_prism.cli.serve import serve
from moe_prism.errors import PrismError
from moe_prism.serving.run import bind

ASK = {"model": NAME, "prompt": "the sea", "extra_body": {"ignore_eos": True}}


def client_of(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def test_a_killed_server_starts_again_and_sigterm_drains(checkpoint: Path) -> None:
    with served(checkpoint) as (url, process):
        stream = client_of(url).completions.create(**ASK, max_tokens=700, stream=True)
        next(stream)
        process.kill()
        with pytest.raises(Exception, match=r"peer closed|Connection") as cut:
            list(stream)
        assert not isinstance(cut.value, APIStatusError)
        with pytest.raises(APIConnectionError):
            client_of(url).models.list()
    port = url.rsplit(":", 1)[1]
    with served(checkpoint, "--port", port) as (url, process):  # the same address, at once
        client = client_of(url)
        stream = client.completions.create(**ASK, max_tokens=700, stream=True)
        next(stream)
        process.send_signal(signal.SIGTERM)
        until(lambda: httpx2.get(f"{url}/ready").status_code == 503)
        with pytest.raises(APIStatusError, match="shutting down") as refused:
            client.completions.create(**ASK)
        assert refused.value.status_code == 503
        chunks = list(stream)
        assert len(chunks) > 400  # special tokens have no text
        assert chunks[-1].choices[0].finish_reason == "length"
        assert process.wait(20) == 0


@pytest.mark.parametrize(("option", "message"), [
    ({"k_min": 17}, "from 1 to 16"),
    ({"policy": "luck"}, "unknown policy 'luck'"),
    ({"api_key": ""}, "API key"),
    ({"drain_seconds": 0}, "drain_seconds must be above 0"),
])  # fmt: skip
def test_bad_options_are_refused_before_the_model_is_loaded(option: dict, message: str, checkpoint: Path) -> None:
    with pytest.raises(PrismError, match=message):
        serve(checkpoint, port=0, **option)


def test_a_stock_model_is_refused(checkpoint: Path) -> None:
    with pytest.raises(PrismError, match="moe-prism refactor"):
        serve(checkpoint.parent / "stock", port=0)


def test_a_missing_extra_is_named_with_the_way_out(checkpoint: Path) -> None:
    code = "import sys; sys.modules['fastapi'] = None; from moe_prism.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "serve", str(checkpoint)], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: the server needs fastapi")
    assert "pip install 'moe-prism[serve]'" in done.stderr


def test_a_taken_address_is_bad_input() -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PrismError, match=f"127.0.0.1:{port}.*--port"):
            bind("127.0.0.1", port)
    with pytest.raises(PrismError, match=r"no\.such\.host"):
        bind("no.such.host.invalid", 1)

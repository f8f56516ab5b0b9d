"""A client that costs next to nothing: requests made beforehand, replies read and not parsed until the clock stops.

What the official client adds to a request it takes from the same two cores as the server. Knows HTTP/1.1 as far as
uvicorn speaks it, with connections that stay open.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from moe_prism.scheduling.outcomes import Job

_END = b"\r\n0\r\n\r\n"  # of a reply in chunks; events have no carriage returns


def tokens_per_s(
    url: str, model: str, work: Sequence[Job], prompts: Sequence[Sequence[int]], clients: int, stream: bool
) -> float:
    """Tokens a second of a closed loop.

    Raises:
        RuntimeError: a request failed, or generated another number of tokens than it asked for.
    """
    requests = [_request(url, model, job, prompt, stream) for job, prompt in zip(work, prompts, strict=True)]
    began = time.perf_counter()
    replies = asyncio.run(_saturate(url, requests, clients))
    seconds = time.perf_counter() - began
    return sum(_tokens(reply, stream) for reply in replies) / seconds


def _request(url: str, model: str, job: Job, prompt: Sequence[int], stream: bool) -> bytes:
    wanted = job.request
    body = {"model": model, "prompt": list(prompt), "max_tokens": job.output_tokens, "temperature": 0}
    body |= {"ignore_eos": True, "vllm_xargs": {"k_min": wanted.k_min, "k_active": wanted.k_active}, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    raw = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw


async def _saturate(url: str, requests: Sequence[bytes], clients: int) -> list[bytes]:
    where, todo, replies = urlsplit(url), iter(requests), []

    async def one_client(mine: Iterator[bytes]) -> None:
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        for request in mine:  # shared: each takes the next
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode())
            length = next((line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), None)
            replies.append(await (reader.readuntil(_END) if length is None else reader.readexactly(int(length[15:]))))
        writer.close()

    await asyncio.gather(*(one_client(todo) for _ in range(clients)))
    return replies


def _tokens(reply: bytes, stream: bool) -> int:
    if not stream:
        return int(json.loads(reply)["usage"]["completion_tokens"])
    events = [line[6:] for line in reply.split(b"\n") if line.startswith(b"data: {")]
    return int(json.loads(events[-1])["usage"]["completion_tokens"])

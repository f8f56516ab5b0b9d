"""Many short requests at once, some of them abandoned: every one is answered exactly once and nothing is left over."""

from __future__ import annotations

import argparse
import asyncio
import random
import subprocess
from collections import Counter
from pathlib import Path

import httpx2
from openai import AsyncOpenAI
from serving_live import NAME

CLIENTS = 64


async def stress(url: str, requests: int, seed: int, clients: int = CLIENTS) -> Counter[str]:
    """What became of them: "whole", "stream", "cancelled", or the name of an error."""
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    todo = iter(range(requests))
    ends: Counter[str] = Counter()
    seen: set[str] = set()

    async def one(number: int) -> str:
        draw = random.Random(seed * 1_000_003 + number)
        tokens = draw.randint(1, 12)
        k = sorted((draw.randint(1, 16), draw.randint(1, 16)))
        ask = {
            "model": NAME, "prompt": " ".join(draw.choices(["the", "sea", "ship", "old"], k=draw.randint(1, 8))),
            "max_tokens": tokens, "temperature": draw.choice([0, 1]),
            "extra_body": {"ignore_eos": True, "vllm_xargs": {"k_min": k[0], "k_active": k[1]}},
        }  # fmt: skip
        if draw.random() < 0.15:  # gone, at some moment of the request's life
            work = asyncio.create_task(client.completions.create(**ask | {"max_tokens": 200}))
            await asyncio.sleep(draw.random() * 0.05)
            work.cancel()
            await asyncio.wait([work])
            return "cancelled" if work.cancelled() else "whole"
        if draw.random() < 0.5:
            reply = await client.completions.create(**ask)
            assert reply.usage.completion_tokens == tokens
            assert k[0] <= reply.usage.mean_k_active <= k[1]
            assert reply.id not in seen
            seen.add(reply.id)
            return "whole"
        ids, reasons = set(), []
        stream = await client.completions.create(**ask, stream=True)
        async for chunk in stream:
            ids.add(chunk.id)
            reasons += [c.finish_reason for c in chunk.choices if c.finish_reason]
            if draw.random() < 0.03:
                await stream.close()  # and with it the connection
                return "cancelled"
        assert (len(ids), reasons) == (1, ["length"]), (ids, reasons, ask)
        assert not ids & seen
        seen.update(ids)
        return "stream"

    async def worker() -> None:
        for number in todo:
            try:
                ends[await one(number)] += 1
            except Exception as error:
                ends[f"{type(error).__name__}: {error}"] += 1

    await asyncio.gather(*(worker() for _ in range(clients)))
    await client.close()
    return ends


def check(ends: Counter[str], requests: int, url: str) -> None:
    """Every request ended once, in a good way, and the server holds none of them any more."""
    assert sum(ends.values()) == requests
    assert set(ends) <= {"whole", "stream", "cancelled"}, ends
    text = httpx2.get(f"{url}/metrics").text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "floor_violations_total"):
        assert f'moe_prism:{name}{{model_name="{NAME}"}} 0.0' in text, name


def resident(process: subprocess.Popen[str]) -> float:
    """MB of memory of a process."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def main() -> None:
    """The large version: ``make test-serve-stress``."""
    import tempfile
    import time

    from making import recipe, save_stock
    from serving_live import served

    import moe_prism

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stock = save_stock(Path(folder) / "stock", max_position_embeddings=1024)
        moe_prism.make_elastic(stock, Path(folder) / "elastic", recipe())
        with served(Path(folder) / "elastic", "--k-min", "4", "--max-waiting", "1000") as (url, process):
            part, before = options.requests // 10, 0.0
            total: Counter[str] = Counter()
            for number in range(10):
                began = time.perf_counter()
                ends = asyncio.run(stress(url, part, options.seed + number))
                time.sleep(1)
                check(ends, part, url)
                total += ends
                memory = resident(process)
                print(
                    f"{(number + 1) * part:6} requests, {part / (time.perf_counter() - began):.0f}/s, {memory:.1f} MB"
                )
                # the first fifth fills caches and pools
                before = memory if number == 1 else before
            assert memory <= 1.05 * before, f"memory grew from {before:.1f} to {memory:.1f} MB"
            print(f"every request answered once: {dict(total)}; memory {before:.1f} MB -> {memory:.1f} MB")


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()

"""Time tokens of the same model under llama.cpp, which maps its file: what the page cache holds is its cache.

    LLAMA_PYTHON -m offload_bench.llama_peer JOB RESULT

Runs under llama.cpp's Python. Who starts it limits the memory of the process and of the pages it reads, and empties the
page cache before (``llama.py``). Every token is drawn, so that no two ask for the same experts for long.
"""

from __future__ import annotations

import random
import resource
import time
from importlib.metadata import version
from statistics import mean, median
from typing import Any

import llama_cpp
from decode_bench.llama_worker import Context, mapped

from offload_bench.job import Job, disk_bytes, peak_rss, run_worker


def measure(job: Job) -> dict[str, Any]:
    """Load, feed the tokens that fill the cache, time those after them."""
    context = Context(job.model, job.threads, tokens=job.warmup + job.tokens, load=mapped)
    drawn = random.Random(0)
    milliseconds = []
    for number in range(-job.warmup, job.tokens):
        if number == 0:
            disk, faults = disk_bytes(), resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        begin = time.perf_counter()
        context.feed([drawn.randrange(context.vocabulary)])
        context.logits().argmax()
        milliseconds.append(1000 * (time.perf_counter() - begin))
    timed = milliseconds[job.warmup :]
    return {
        "ms_per_token": mean(timed),
        "ms_median": median(timed),
        "disk_mb_per_token": (disk_bytes() - disk) / job.tokens / 1e6,
        "major_faults_per_token": (resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults) / job.tokens,
        "peak_rss_gb": peak_rss() / 1e9,
        "llama_cpp_python": version("llama-cpp-python"),
        "system_info": llama_cpp.llama_print_system_info().decode().strip(),
        "warmup": job.warmup,
        "tokens": job.tokens,
        "ms_warmup": milliseconds[: job.warmup],
        "ms": timed,
    }


if __name__ == "__main__":
    run_worker(measure)

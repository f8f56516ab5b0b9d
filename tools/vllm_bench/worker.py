"""One vLLM engine in a process of its own, which measures decode steps as it is told, line by line.

    VLLM_PYTHON -m vllm_bench.worker MODEL elastic|stock OPTIONS < cases > results

A case is ``{"budgets": [k or null, ...], "prompt": P, "steps": S}``: as many requests as budgets, sent together. The
answer is ``{"seconds": [...]}``, one number for every step in which all of them decoded.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import count
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # steps are measured where they are run
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
if sys.argv[2] == "stock":
    os.environ["VLLM_PLUGINS"] = ""

import numpy as np
from vllm import LLM, SamplingParams, __version__

_names = map(str, count())


def decode(llm: Any, case: dict[str, Any]) -> list[float]:
    """Seconds of every pure decode step of a case."""
    engine, budgets = llm.llm_engine, case["budgets"]
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    rng = np.random.default_rng(len(budgets))
    for k in budgets:
        asked = SamplingParams(
            max_tokens=case["steps"] + 2,
            temperature=0,
            ignore_eos=True,
            extra_args=None if k is None else {"k_active": k},
        )
        prompt = rng.integers(0, vocabulary, case["prompt"]).tolist()
        engine.add_request(next(_names), {"prompt_token_ids": prompt}, asked)
    times, tokens = [], 0
    while engine.has_unfinished_requests():
        began = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - began
        before, tokens = tokens, sum(len(o.outputs[0].token_ids) for o in outputs)
        if len(outputs) == len(budgets) and before >= len(budgets) and tokens - before == len(budgets):
            times.append(seconds)
    return times[1:]


def main() -> None:
    """Load, then answer cases until the input ends."""
    model, kind, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    if kind == "elastic":
        from moe_prism.vllm_plugin.setup import SCHEDULER, WORKER

        options |= {"worker_cls": WORKER, "scheduler_cls": SCHEDULER}
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is not an answer
    llm = LLM(model, enable_prefix_caching=False, **options)
    print(json.dumps({"vllm": __version__}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": decode(llm, json.loads(line))}), file=out, flush=True)


if __name__ == "__main__":
    main()

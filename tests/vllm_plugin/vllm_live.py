"""vLLM engines in this process, and what transformers' elastic model says to compare with."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# before vLLM is imported: the engine in this process, all threads where the test's machine puts them
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import torch
from making import recipe, save_stock

from moe_prism import load_elastic, make_elastic, set_budget
from moe_prism.vllm_plugin.setup import SCHEDULER, WORKER

# vLLM's CPU kernels want hidden sizes, neurons and heads in multiples of 32.
WIDE: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
_LATENT: dict[str, Any] = {"qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32}
NEURONS: dict[str, dict[str, Any]] = {
    "olmoe": {"intermediate_size": 128},
    "mixtral": {"intermediate_size": 128, "num_local_experts": 6},
    "qwen2_moe": {"moe_intermediate_size": 128},
    "qwen3_moe": {"moe_intermediate_size": 128, "head_dim": 32},
    "gpt_oss": {"intermediate_size": 128, "head_dim": 32},
    "deepseek_v2": {"moe_intermediate_size": 128, **_LATENT},
    "deepseek_v3": {"moe_intermediate_size": 128, "topk_method": "noaux_tc", "scoring_func": "sigmoid", **_LATENT},
}
PROMPT = [5, 17, 33, 8, 61, 90, 12, 44, 27, 3]
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 96,
    "kv_cache_memory_bytes": 1 << 24,
    "block_size": 32,
}
ELASTIC = {"worker_cls": WORKER, "scheduler_cls": SCHEDULER}


def made(folder: Path, family: str = "olmoe", **changes: Any) -> Path:
    """An elastic checkpoint of a tiny model, its original beside it in ``stock``."""
    stock = folder / "stock"
    if not stock.exists():
        save_stock(stock, family, **{**WIDE, **NEURONS[family]})
    make_elastic(stock, folder / "elastic", recipe(**changes))
    return folder / "elastic"


@contextmanager
def engine(path: Path, **more: Any) -> Iterator[Any]:
    """An ``LLM`` in fp32 without compilation."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(str(path), **{**OPTIONS, **more})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(llm: Any, budgets: Sequence[dict[str, Any] | None], prompts: Sequence[list[int]] = (), n: int = 12) -> Any:
    """Greedy outputs of requests that are sent together, one for each dictionary of arguments."""
    from vllm import SamplingParams

    asked = [SamplingParams(max_tokens=n, temperature=0, logprobs=1, ignore_eos=True, extra_args=k) for k in budgets]
    given = [{"prompt_token_ids": list(prompt)} for prompt in (prompts or [PROMPT] * len(asked))]
    return llm.generate(given, asked, use_tqdm=False)


def tokens_of(outputs: Any) -> list[list[int]]:
    """Generated ids of each."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def logprobs_of(output: Any) -> torch.Tensor:
    """Log-probability of every generated token, ``[n]``."""
    found = output.outputs[0]
    return torch.tensor([step[token].logprob for step, token in zip(found.logprobs, found.token_ids, strict=True)])


class Reference:
    """The same checkpoint in transformers."""

    def __init__(self, path: Path) -> None:
        self.model = load_elastic(path, dtype=torch.float32)

    def greedy(self, k_active: int, n: int = 12, prompt: Sequence[int] = PROMPT) -> tuple[list[int], torch.Tensor]:
        """Tokens and their log-probabilities at a budget."""
        set_budget(self.model, k_active)
        ids, logs = list(prompt), []
        for _ in range(n):
            with torch.no_grad():
                last = self.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(last.argmax()))
            logs.append(last.max())
        return ids[len(prompt) :], torch.stack(logs)

"""Time decode steps of stock transformers with its own experts implementation.

    python -m decode_bench.torch_worker JOB RESULT

A step is one forward pass with a cache that grows, and the choice of the likeliest token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from decode_bench.job import Job, run_worker, save_logits, time_decoder
from moe_prism.evaluation.environment import machine, versions


class Decoder:
    """A batch of sequences with its cache."""

    def __init__(self, model: PreTrainedModel, rows: Tensor) -> None:
        self.model, self.rows, self.cache = model, rows, DynamicCache(config=model.config)

    def feed(self, start: int, end: int) -> Tensor:
        """Run tokens ``start:end`` of every row; logits ``[B, V]`` of the last."""
        out = self.model(self.rows[:, start:end], past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        last: Tensor = out.logits[:, -1]
        return last


def measure(job: Job) -> dict[str, Any]:
    """Check, then every point."""
    torch.set_num_threads(job.threads)
    model = load(job)
    with torch.inference_mode():
        checked = Decoder(model, torch.tensor(job.rows(1)))
        checked.feed(0, job.prompt - 1)
        # The last token alone: the path that is timed.
        save_logits(job, checked.feed(job.prompt - 1, job.prompt)[0].float().numpy())
        points = [
            {
                "tokens": tokens,
                "k_active": k_active,
                "ms": time_decoder(Decoder(model, torch.tensor(job.rows(tokens))), job),
            }
            for tokens, k_active in job.points
        ]
    return {
        "points": points,
        "versions": versions(),
        "machine": machine(model) | {"torch_cpu_capability": torch.backends.cpu.get_cpu_capability()},
        "notes": {"experts_implementation": str(model.config._experts_implementation)},
    }


def load(job: Job) -> PreTrainedModel:
    """The model in bf16."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.bfloat16)
    model.eval()
    return model


if __name__ == "__main__":
    run_worker(measure)

"""Time decode steps of moe-prism's engine.

    python -m decode_bench.prism_worker JOB RESULT

A step is one of ``engine.runner``, which serves: every sequence with its own budget and its own part of the memory for
keys and values, and the choice of the likeliest token.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from decode_bench.job import LONGEST, Job, run_worker, save_logits, time_decoder
from moe_prism import load_elastic
from moe_prism.engine.attention import Span
from moe_prism.engine.runner import Runner
from moe_prism.evaluation.environment import machine, versions


class Decoder:
    """A batch of sequences at one budget."""

    def __init__(self, runner: Runner, rows: list[list[int]], k_active: int) -> None:
        self.runner, self.rows, self.budgets = runner, np.array(rows), [k_active] * len(rows)

    def feed(self, start: int, end: int) -> Tensor:
        """Run tokens ``start:end`` of every row; logits ``[B, V]`` of the last."""
        length = end - start
        spans = [Span(row * length, length, row * LONGEST, start) for row in range(len(self.rows))]
        last = [span.first + length - 1 for span in spans]
        return self.runner.forward(self.rows[:, start:end].ravel(), spans, self.budgets, last)


def measure(job: Job) -> dict[str, Any]:
    """Check, then every point."""
    torch.set_num_threads(job.threads)
    model = load_elastic(job.model, dtype=torch.bfloat16, verify=False)  # the weights were just written
    runner = Runner(model, LONGEST * max(tokens for tokens, _ in job.points))
    checked = Decoder(runner, job.rows(1), runner.dial.full_budget)
    checked.feed(0, job.prompt - 1)
    # The last token alone: the path that is timed.
    save_logits(job, checked.feed(job.prompt - 1, job.prompt)[0].numpy())
    points = [
        {"tokens": tokens, "k_active": k_active, "ms": time_decoder(Decoder(runner, job.rows(tokens), k_active), job)}
        for tokens, k_active in job.points
    ]
    return {
        "points": points,
        "versions": versions() | {"numba": numba.__version__},
        "machine": machine(model) | {"torch_cpu_capability": torch.backends.cpu.get_cpu_capability()},
        "notes": {"compiled": str(runner.compiled)},
    }


if __name__ == "__main__":
    run_worker(measure)

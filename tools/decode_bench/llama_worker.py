"""Time decode steps of llama.cpp, one token at a time, through the C interface of llama-cpp-python.

    LLAMA_PYTHON -m decode_bench.llama_worker JOB RESULT

A step is one ``llama_decode`` and the choice of the likeliest token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from decode_bench.job import LONGEST, Job, run_worker, save_logits, time_steps


def in_memory(loading: Any) -> None:
    """Read weights into memory: a mapped file would be paged in, expert by expert, inside the timed steps."""
    _load(loading, "LLAMA_LOAD_MODE_NONE", False)


def mapped(loading: Any) -> None:
    """Map the file."""
    _load(loading, "LLAMA_LOAD_MODE_MMAP", True)


def _load(loading: Any, mode: str, use_mmap: bool) -> None:
    # A ctypes structure takes any attribute, so the field's name, which depends on the version, is looked up.
    if hasattr(type(loading), "load_mode"):
        loading.load_mode = getattr(llama_cpp, mode)
    else:
        loading.use_mmap = use_mmap


class Context:
    """A context of llama.cpp, which runs one sequence."""

    def __init__(
        self,
        model: str,
        threads: int,
        tokens: int = LONGEST,
        load: Callable[[Any], None] = in_memory,
    ) -> None:
        """Load a model.

        Args:
            model: a GGUF file.
            threads: that compute.
            tokens: of the sequence, at most.
            load: says how weights are loaded.
        """
        llama_cpp.llama_backend_init()
        loading = llama_cpp.llama_model_default_params()
        load(loading)
        loading.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), loading)
        if not self.model:
            raise SystemExit(f"error: llama.cpp cannot load {model}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = tokens
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise SystemExit("error: llama.cpp cannot make a context")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def feed(self, tokens: list[int]) -> None:
        """Run tokens after those before."""
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        failed = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(tokens)))
        if failed:
            raise SystemExit(f"error: llama_decode returned {failed}")

    def logits(self) -> NDArray[np.float32]:
        """Of the last token, ``[V]``; valid until the next call."""
        pointer = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,))

    def forget(self) -> None:
        """Start a new sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)


def measure(job: Job) -> dict[str, Any]:
    """Check, then every point; points must be of one token."""
    decoder = Context(job.model, job.threads)
    row = job.rows(1)[0]
    decoder.feed(row[: job.prompt - 1])
    decoder.feed(row[job.prompt - 1 : job.prompt])
    save_logits(job, decoder.logits().copy())

    def step(position: int) -> None:
        decoder.feed(row[position : position + 1])
        decoder.logits().argmax()

    points = []
    for tokens, k_active in job.points:
        decoder.forget()
        decoder.feed(row[: job.prompt])
        points.append({"tokens": tokens, "k_active": k_active, "ms": time_steps(step, job)})
    return {
        "points": points,
        "versions": {"llama-cpp-python": version("llama-cpp-python")},
        "notes": {"system_info": llama_cpp.llama_print_system_info().decode().strip(), "mmap": False},
    }


if __name__ == "__main__":
    run_worker(measure)

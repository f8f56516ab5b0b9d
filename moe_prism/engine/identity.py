"""Which engine and machine a cost model is of: the words that are stored with it and compared before it is used."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..evaluation.environment import machine

ENGINE = "embedded"


def machine_of(model: PreTrainedModel) -> str:
    """The machine a loaded model runs on, e.g. "AMD EPYC 7R13 Processor, 2 cores, 2 threads, cpu, float32"."""
    found = machine(model)
    words = [found["cpu"], f"{found['cores']} cores", f"{torch.get_num_threads()} threads"]
    words += [found[name] for name in ("gpu", "device", "dtype") if name in found]
    return ", ".join(map(str, words))

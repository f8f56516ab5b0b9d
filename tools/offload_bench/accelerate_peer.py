"""Time tokens of the same model under accelerate's disk offload, as transformers sets it up.

    python -m offload_bench.accelerate_peer JOB RESULT

Layers whose experts fit the memory stay in it, the others' experts are read for every token from the files that
transformers writes for ``device_map`` with "disk". The page cache would hold all of them on a machine with more memory
than the budget, so what it holds of them is dropped before every token.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from accelerate import dispatch_model, init_empty_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from moe_prism.checkpoint.schema import CONFIG_KEY
from moe_prism.experts import find_expert_layers
from moe_prism.offload.block_file import BlockFile, aligned
from moe_prism.offload.pack import BLOCKS_FILE, RESIDENT_FILE, STACKED
from offload_bench.job import Job, disk_bytes, peak_rss, run_worker
from offload_bench.routing import Routing

# Interpreter, libraries, keys and values.
_REST = 900_000_000


def write_files(packed: Path, out: Path) -> None:
    """Experts of every layer in the stacked form, one file a tensor; from a block file of whole experts."""
    work = out.with_name(f".{out.name}.writing")
    work.mkdir(parents=True, exist_ok=True)
    with BlockFile(packed / BLOCKS_FILE) as file:
        layout = file.layout
        memory = aligned(layout.stride)
        hidden, neurons = layout.hidden_size, layout.neurons
        for number, name in enumerate(layout.layers):
            gate_up = torch.empty(layout.num_experts, 2 * neurons, hidden, dtype=torch.bfloat16)
            down = torch.empty(layout.num_experts, hidden, neurons, dtype=torch.bfloat16)
            for expert in range(layout.num_experts):
                file.read(number * layout.per_layer + expert, memoryview(memory))  # type: ignore[arg-type]
                rows = torch.from_numpy(memory).view(torch.bfloat16).view(-1, hidden)
                gate_up[expert], down[expert] = rows[: 2 * neurons], rows[2 * neurons : 3 * neurons].t()
            for kind, weight in zip(STACKED, (gate_up, down), strict=True):
                save_file({f"{name}.{kind}": weight}, work / f"{name}.{kind}.safetensors")
    work.rename(out)


def load(job: Job) -> tuple[nn.Module, list[Path], int]:
    """The model, the files it reads from, and how many layers' experts are in memory."""
    folder, packed = Path(job.model), Path((job.options or {})["packed"])
    config = AutoConfig.from_pretrained(packed)
    delattr(config, CONFIG_KEY)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = load_file(packed / RESIDENT_FILE)
    model.load_state_dict({name: w.clone() for name, w in weights.items()}, strict=False, assign=True)
    layers = find_expert_layers(model)
    one = sum(file.stat().st_size for file in folder.glob(f"{layers[0].name}.*"))
    fit = max(0, int((job.memory - _REST - sum(w.nbytes for w in weights.values())) // one))
    places: dict[str, str] = {}
    index: dict[str, dict[str, str]] = {}
    files = []
    experts = {layer.name: number for number, layer in enumerate(layers)}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{layer}.") for layer in experts)
        if name in experts:
            places[name] = "cpu" if experts[name] < fit else "disk"
            for kind in STACKED:
                file = folder / f"{name}.{kind}.safetensors"
                key = f"{name}.{kind}"
                if experts[name] < fit:
                    with safe_open(file, "pt") as opened:
                        setattr(module, kind, nn.Parameter(opened.get_tensor(key).clone(), requires_grad=False))
                else:
                    files.append(file)
                    index[key] = {"safetensors_file": str(file), "weight_name": key, "dtype": "bfloat16"}
        elif not inside and (next(module.parameters(recurse=False), None) is not None or not list(module.children())):
            places[name] = "cpu"
    model = dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), offload_index=index, force_hooks=True
    )
    model.eval()
    return model, files, fit


def measure(job: Job) -> dict[str, Any]:
    """Load and time, every token from a cold page cache."""
    torch.set_num_threads(job.threads)
    routing = Routing.load(job.routing)
    model, files, fit = load(job)
    now = [0]
    for number, layer in enumerate(find_expert_layers(model)):
        own, k = layer.router.forward, job.k_active

        def forward(x: torch.Tensor, own: Any = own, number: int = number, k: int = k) -> Any:
            logits, _, _ = own(x)
            weight = torch.from_numpy(routing.weight[number, now[0] : now[0] + 1, :k])
            return logits, weight.to(x.dtype), torch.from_numpy(routing.index[number, now[0] : now[0] + 1, :k])

        layer.router.forward = forward
    opened = [os.open(file, os.O_RDONLY) for file in files]
    cache, milliseconds, disk = DynamicCache(config=model.config), [], 0
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, model.config.vocab_size, job.tokens + 1))
    with torch.inference_mode():
        for number in range(job.tokens + 1):
            now[0] = job.warmup + number
            for descriptor in opened:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            if number == 1:  # the first is not timed
                disk = disk_bytes()
            begin = time.perf_counter()
            model(input_ids=ids[None, number : number + 1], past_key_values=cache, use_cache=True).logits.argmax(dim=-1)
            milliseconds.append(1000 * (time.perf_counter() - begin))
    timed = milliseconds[1:]
    return {
        "ms_per_token": mean(timed),
        "ms_median": median(timed),
        "disk_mb_per_token": (disk_bytes() - disk) / job.tokens / 1e6,
        "peak_rss_gb": peak_rss() / 1e9,
        "layers_in_memory": fit,
        "experts_implementation": str(model.config._experts_implementation),
        "tokens": job.tokens,
        "ms": timed,
    }


if __name__ == "__main__":
    run_worker(measure)

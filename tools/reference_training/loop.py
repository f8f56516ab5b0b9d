"""One training process: batches, schedule, optimiser, logs, checkpoints that survive a kill.

Several processes (CPU) average their gradients through gloo; every one applies the same optimiser
step, so that a checkpoint of rank 0 is the whole state. Knows nothing of Hugging Face formats.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from .data import Batches
from .model import ModelConfig, ReferenceModel
from .ops import compile_pointwise

START = "start.pt"  # weights and step of an exported model that a run goes on from
SNAPSHOTS = (0.10, 0.30, 1.00)  # shares of the token budget at which weights are kept


@dataclass(frozen=True)
class TrainConfig:
    """What a run is made of, except for the text and the model."""

    tokens: int
    minutes: float | None
    step_tokens: int
    context: int
    learning_rate: float
    warmup_steps: int
    decay_share: float
    weight_decay: float
    balance_loss: float
    z_loss: float
    seed: int
    compile: bool


def schedule(step: int, progress: float, config: TrainConfig) -> float:
    """Warm-up, constant, then linear to zero over the last ``decay_share`` of the budget.

    ``step`` counts from where the optimiser was new, ``progress`` from the very beginning.
    """
    return min(1.0, (step + 1) / config.warmup_steps, max(0.0, 1 - progress) / config.decay_share)


def _batches_key(config: TrainConfig) -> dict[str, int]:
    """What decides which tokens step i sees; a run that resumes must not change it. The budgets may change."""
    return {"seed": config.seed, "step_tokens": config.step_tokens, "context": config.context}


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint under a temporary name and rename it."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def run(rank: int, ranks: int, workdir: Path, model_config: ModelConfig, config: TrainConfig, device: str) -> None:
    """Train until the token or the time budget is spent; continues from ``workdir/state.pt`` if it is there.

    Without it, from ``workdir/start.pt`` (an exported model, with a new optimiser), else from random weights.
    """
    if ranks > 1:
        rendezvous = f"file://{workdir / 'rendezvous'}"
        distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks)
        torch.set_num_threads(1)
    if config.compile:
        compile_pointwise()
    where = torch.device(device)
    model = ReferenceModel(model_config, config.seed, where)
    model.flat.grad = torch.zeros_like(model.flat)
    head = torch.nn.Parameter(model.flat.detach()[: model.decayed])
    tail = torch.nn.Parameter(model.flat.detach()[model.decayed :])
    head.grad, tail.grad = model.flat.grad[: model.decayed], model.flat.grad[model.decayed :]
    optimiser = torch.optim.AdamW(
        [{"params": [head], "weight_decay": config.weight_decay}, {"params": [tail], "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(0.9, 0.95),
        eps=1e-8,
        fused=True,
    )
    batches = Batches(workdir / "tokens.bin", config.context, config.step_tokens // config.context, config.seed)
    step, first_step, spent = 0, 0, 0.0
    state_path, start_path = workdir / "state.pt", workdir / START
    if state_path.exists():
        state = torch.load(state_path, map_location=where, weights_only=True)
        if state["model_config"] != asdict(model_config):
            raise SystemExit(f"{state_path} is of another model: {state['model_config']}; name another --workdir")
        if state["batches"] != _batches_key(config):
            raise SystemExit(
                f"{state_path} was trained on other batches: {state['batches']}; give the same settings, or another "
                "--workdir"
            )
        model.flat.data.copy_(state["flat"])
        optimiser.load_state_dict(state["optimiser"])
        step, first_step, spent = state["step"], state["first_step"], state["seconds"]
    elif start_path.exists():
        start = torch.load(start_path, map_location=where, weights_only=True)
        model.flat.data.copy_(start["flat"])
        step = first_step = start["step"]
    per_step = batches.per_step * config.context
    total_steps = -(-config.tokens // per_step)
    started = time.monotonic() - spent
    last_save = last_log = time.monotonic()
    logged_step = step

    def checkpoint() -> None:
        if rank == 0:
            optimiser_state = optimiser.state_dict()
            seconds = time.monotonic() - started
            state = {"flat": model.flat.data, "optimiser": optimiser_state, "step": step, "seconds": seconds}
            state["first_step"] = first_step
            fixed = {"model_config": asdict(model_config), "batches": _batches_key(config)}
            save(state_path, state | fixed)

    while True:
        elapsed = time.monotonic() - started
        progress = step / total_steps
        if config.minutes is not None:
            progress = max(progress, elapsed / 60 / config.minutes)
        if ranks > 1:  # clocks differ: rank 0 decides
            shared = torch.tensor([progress], dtype=torch.float64)
            distributed.broadcast(shared, 0)
            progress = float(shared)
        if progress >= 1:
            break
        rate = config.learning_rate * schedule(step - first_step, progress, config)
        for group in optimiser.param_groups:
            group["lr"] = rate
        losses = model(batches.get(step, rank, ranks).to(where))
        objective = losses["loss"] + config.balance_loss * losses["balance"] + config.z_loss * losses["z"]
        model.flat.grad.zero_()
        objective.backward()
        if ranks > 1:
            distributed.all_reduce(model.flat.grad)
            model.flat.grad /= ranks
        norm = model.flat.grad.norm()
        if not torch.isfinite(norm):
            raise SystemExit(f"step {step}: the gradient is {norm.item()}; lower --learning-rate and restart")
        model.flat.grad *= min(1.0, 1.0 / (float(norm) + 1e-6))
        optimiser.step()
        before, step = progress, step + 1
        now_at = step / total_steps
        if config.minutes is not None:
            now_at = max(now_at, (time.monotonic() - started) / 60 / config.minutes)
        if rank == 0 and (step % 20 == 0 or step == 1):
            now = time.monotonic()
            record = {
                "step": step,
                "tokens": step * per_step,
                "loss": round(losses["loss"].item(), 4),
                "balance": round(losses["balance"].item(), 4),
                "z": round(losses["z"].item(), 4),
                "busiest_expert": round(losses["load"].max().item() * model_config.experts / model_config.top_k, 3),
                "idlest_expert": round(losses["load"].min().item() * model_config.experts / model_config.top_k, 3),
                "grad_norm": round(float(norm), 3),
                "lr": round(rate, 7),
                "tokens_per_s": round((step - logged_step) * per_step / (now - last_log)),
                "seconds": round(now - started),
            }
            last_log, logged_step = now, step
            with (workdir / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
            print(record, flush=True)
        for share in SNAPSHOTS:
            if rank == 0 and before < share <= now_at:
                save(workdir / f"weights-{round(share * 100):03d}.pt", {"flat": model.flat.data, "step": step})
        if time.monotonic() - last_save > 120:
            checkpoint()
            last_save = time.monotonic()
    checkpoint()
    if rank == 0:
        save(workdir / "weights-100.pt", {"flat": model.flat.data, "step": step})
    if ranks > 1:
        distributed.destroy_process_group()

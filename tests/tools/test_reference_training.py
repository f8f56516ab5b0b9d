"""The training arithmetic against plain autograd, batches, and a run that is killed and resumed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import types
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_samples import OPTIONS, SIZES, Trained
from reference_training import loop
from reference_training.data import Batches
from reference_training.loop import TrainConfig, run, schedule
from reference_training.ops import LinearCrossEntropy, SparseExperts
from torch import Tensor, multiprocessing
from torch.nn import functional as F
from train_reference import main

TRAINING = TrainConfig(
    tokens=30 * 256,
    minutes=None,
    step_tokens=256,
    context=32,
    learning_rate=0.01,
    warmup_steps=5,
    decay_share=0.3,
    weight_decay=0.1,
    balance_loss=0.01,
    z_loss=0.001,
    seed=0,
    compile=False,
)
PROCESSES = "forkserver"  # torch is imported once for all of them; a plain fork cannot use a GPU machine's autograd
multiprocessing.get_context(PROCESSES).set_forkserver_preload(["reference_training.loop"])


def run_until_killed(workdir: Path, at_step: int) -> None:
    """Train, and die by SIGKILL on asking for a step's batch; the clock jumps so that checkpoints fall before."""
    ticks = itertools.count(step=13)
    loop.time = types.SimpleNamespace(monotonic=lambda: float(next(ticks)))
    get = Batches.get

    def get_or_die(self: Batches, step: int, rank: int, ranks: int) -> Tensor:
        if step == at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return get(self, step, rank, ranks)

    Batches.get = get_or_die
    torch.set_num_threads(1)
    run(0, 1, workdir, SIZES, TRAINING, "cpu")


def plain_experts(x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Every token through its experts one at a time, in operations that autograd knows."""
    rows = []
    for t in range(len(x)):
        row = torch.zeros_like(x[t])
        for slot, e in enumerate(index[t].tolist()):
            gate, up = (gate_up[e] @ x[t]).chunk(2)
            row = row + weight[t, slot] * (down[e] @ (F.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def test_sparse_experts_equal_plain_autograd() -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, weight, gate_up, down = random(9, 6), random(9, 2), random(5, 8, 6), random(5, 6, 4)
    # expert 4 gets no token
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(9)])
    parts = (x, weight, gate_up, down)
    upstream = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    ours = SparseExperts.apply(x, index, weight, gate_up, down)
    plain = plain_experts(x, index, weight, gate_up, down)
    torch.testing.assert_close(ours, plain)
    for got, expected in zip(
        torch.autograd.grad(ours, parts, upstream), torch.autograd.grad(plain, parts, upstream), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("chunk", [3, 7, 512])
def test_linear_cross_entropy_equals_plain_autograd(chunk: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(10, 4, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(6, 4, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(6, (10,), generator=generator)
    ours = LinearCrossEntropy.apply(x, head, target, chunk)
    plain = F.cross_entropy(x @ head.t(), target)
    torch.testing.assert_close(ours, plain)
    got = torch.autograd.grad(2.5 * ours, (x, head))
    expected = torch.autograd.grad(2.5 * plain, (x, head))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token file in which every token is its own position."""
    path = tmp_path_factory.mktemp("numbers") / "tokens.bin"
    np.arange(1000, dtype=np.uint16).tofile(path)
    return path


@settings(max_examples=30, deadline=None)
@given(context=st.integers(2, 40), per_step=st.integers(2, 8), seed=st.integers(0, 5), ranks=st.integers(1, 3))
def test_batches_cover_an_epoch_once_and_ranks_share_a_step(
    numbers: Path, context: int, per_step: int, seed: int, ranks: int
) -> None:
    ranks = min(ranks, per_step)
    batches = Batches(numbers, context, per_step, seed)
    starts = []
    for step in range(-(-batches.windows // per_step)):
        alone = batches.get(step, 0, 1)
        assert alone.shape == (per_step, context + 1)
        assert (alone.diff(dim=1) == 1).all()  # consecutive tokens
        shared = torch.cat([batches.get(step, rank, ranks) for rank in range(ranks)])
        assert sorted(shared[:, 0].tolist()) == sorted(alone[:, 0].tolist())
        starts += alone[:, 0].tolist()
    first_epoch = sorted(starts[: batches.windows])
    assert (np.diff(first_epoch) == context).all()  # no window twice, no overlap, none left out
    again = Batches(numbers, context, per_step, seed)
    assert torch.equal(again.get(3, 0, 1), batches.get(3, 0, 1))


def test_schedule_rises_stays_and_falls_to_zero() -> None:
    rates = [schedule(step, step / 100, TRAINING) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[4:71] == [1.0] * 67
    assert np.all(np.diff(rates[70:]) < 0)
    assert rates[100] == 0


def test_training_lowers_the_loss(trained: Trained) -> None:
    log = [json.loads(line) for line in (trained.workdir / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == [1, 20, 40]
    assert log[0]["loss"] == pytest.approx(np.log(SIZES.vocab_size), abs=0.2)  # it starts at chance
    assert log[-1]["loss"] < 0.75 * log[0]["loss"]


def test_snapshots_are_kept_on_the_way(trained: Trained) -> None:
    for name, step in (("weights-010.pt", 4), ("weights-030.pt", 12), ("weights-100.pt", 40)):
        assert torch.load(trained.workdir / name)["step"] == step


def workdir_like(trained: Trained, folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(trained.workdir / "tokens.bin", folder)
    return folder


def test_a_killed_run_resumes_to_the_same_weights(trained: Trained, tmp_path: Path) -> None:
    killed = workdir_like(trained, tmp_path / "killed")
    process = multiprocessing.get_context(PROCESSES).Process(target=run_until_killed, args=(killed, 17))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    resumed_from = torch.load(killed / "state.pt")["step"]
    assert 0 < resumed_from < 17
    run(0, 1, killed, SIZES, TRAINING, "cpu")

    whole = workdir_like(trained, tmp_path / "whole")
    run(0, 1, whole, SIZES, TRAINING, "cpu")
    final = [torch.load(folder / "weights-100.pt") for folder in (killed, whole)]
    assert final[0]["step"] == final[1]["step"] == 30
    torch.testing.assert_close(final[0]["flat"], final[1]["flat"], rtol=0, atol=1e-6)


def test_two_processes_take_the_same_steps_as_one(trained: Trained, tmp_path: Path) -> None:
    # the balance loss depends on each process's own tokens; without it the averaged gradient is the whole batch's
    few = TrainConfig(**{**asdict(TRAINING), "tokens": 3 * 256, "balance_loss": 0.0})
    folders = [workdir_like(trained, tmp_path / name) for name in ("one", "two")]
    run(0, 1, folders[0], SIZES, few, "cpu")
    job = (2, folders[1], SIZES, few, "cpu")
    multiprocessing.start_processes(run, args=job, nprocs=2, start_method=PROCESSES)
    one, two = (torch.load(folder / "weights-100.pt")["flat"] for folder in folders)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


def test_state_of_another_model_is_refused(trained: Trained) -> None:
    other = type(SIZES)(**{**asdict(SIZES), "neurons": 8})
    with pytest.raises(SystemExit, match="another model"):
        run(0, 1, trained.workdir, other, TRAINING, "cpu")


def test_an_exported_model_can_be_trained_on_without_its_working_directory(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "more"
    options = [*OPTIONS, "--tokens", str(60 * 256), "--workdir", str(tmp_path / "new"), "--out", str(out)]
    main([str(trained.text), *options, "--init-from", str(trained.out)])
    log = [json.loads(line) for line in (out / "training_log.jsonl").read_text().splitlines()]
    first = [json.loads(line) for line in (trained.out / "training_log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 60
    assert log[: len(first)] == first  # one log of both runs
    after = log[len(first) :]
    assert after[0]["step"] > 40  # it goes on where the export stopped
    assert after[0]["loss"] < first[0]["loss"] - 1
    commands = [line for line in (out / "README.md").read_text().splitlines() if line.startswith("python tools/")]
    assert len(commands) == 2
    assert "MODEL-OF-THE-LINE-ABOVE" in commands[1]
    with pytest.raises(SystemExit, match="settings mean"):
        main(
            [
                str(trained.text),
                *options,
                "--init-from",
                str(trained.out),
                "--neurons",
                "8",
                "--workdir",
                f"{tmp_path}/x",
            ]
        )

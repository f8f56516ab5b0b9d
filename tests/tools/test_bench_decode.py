"""The parts of tools/bench_decode.py that need no other engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_decode
from decode_bench import gguf_file, prism_worker, report, torch_worker
from decode_bench.checkpoint import write_model
from decode_bench.job import Job, time_steps

from moe_prism import load_elastic, set_budget

# More than ten experts: "10" sorts before "2".
TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 12,
    "num_experts_per_tok": 4,
}
FULL = 16


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decode") / "model"
    write_model(folder, layers=2, seed=3, **TINY)
    return folder


def job(folder: Path, engine: str, **changes: Any) -> Job:
    settings = {
        "engine": engine,
        "model": str(folder),
        "points": [(1, FULL)],
        "threads": 1,
        "prompt": 6,
        "warmup": 1,
        "steps": 3,
        "vocabulary": 96,
        "seed": 0,
        "logits": str(folder.parent / f"{engine}.npy"),
    }
    return Job(**settings | changes)


def stock_logits(folder: Path, swap: bool = False) -> np.ndarray:
    """Logits after the prompt by one plain forward pass, perhaps with gate and up exchanged."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if swap:
        for layer in model.model.layers:
            gate, up = layer.mlp.experts.gate_up_proj.data.chunk(2, dim=1)
            layer.mlp.experts.gate_up_proj.data = torch.cat([up, gate], dim=1)
    with torch.no_grad():
        return model(torch.tensor(job(folder, "any").rows(1))[:, :6]).logits[0, -1].numpy()


def test_the_checkpoint_is_whole_and_elastic(model_folder: Path) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(model_folder, output_loading_info=True)
    assert not loaded[1]["missing_keys"]
    assert not loaded[1]["unexpected_keys"]
    model = load_elastic(model_folder)  # checks every file's checksum and every layer's fingerprint
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        full = model(tokens).logits
        set_budget(model, 5)
        assert not torch.allclose(model(tokens).logits, full, atol=1e-3)


def test_both_torch_engines_time_every_point_and_agree_with_a_plain_forward(model_folder: Path) -> None:
    truth = stock_logits(model_folder)
    for worker, points in ((prism_worker, [(1, 5), (3, FULL)]), (torch_worker, [(2, FULL)])):
        mine = job(model_folder, "any", points=points)
        found = worker.measure(mine)
        assert [(point["tokens"], point["k_active"], len(point["ms"])) for point in found["points"]] == [
            (tokens, k_active, 3) for tokens, k_active in points
        ]
        assert report.agreement(np.load(mine.logits), truth).ok  # bf16 against fp32
    assert found["notes"]["experts_implementation"] != "moe_prism"


def test_the_check_sees_exchanged_weights(model_folder: Path) -> None:
    assert not report.agreement(stock_logits(model_folder, swap=True), stock_logits(model_folder)).ok


def test_agreement_ignores_a_constant() -> None:
    logits = np.array([0.1, 3.0, -1.0, 0.5], np.float32)
    assert report.agreement(logits - 7, logits).cosine == pytest.approx(1)
    assert report.agreement(-logits, logits) == (pytest.approx(-1), False, False)


def test_every_weight_has_its_place_in_the_gguf_file(model_folder: Path) -> None:
    weights = gguf_file.bf16_tensors(model_folder)
    stored = {n: v for file in model_folder.glob("*.safetensors") for n, v in load_file(file).items()}
    assert weights.keys() == stored.keys()
    for name, bits in weights.items():
        assert np.array_equal(gguf_file.widened(bits), stored[name].float().numpy())
    pieces = dict(gguf_file.stacked(weights))
    # The names that llama.cpp's source asks for.
    blocks = "attn_norm attn_q attn_k attn_v attn_output attn_q_norm attn_k_norm ffn_norm ffn_gate_inp"
    blocks += " ffn_gate_exps ffn_up_exps ffn_down_exps"
    assert pieces.keys() == {f"blk.{i}.{name}" for i in (0, 1) for name in blocks.split()} | {
        "token_embd",
        "output_norm",
        "output",
    }
    loaded = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).state_dict()
    gate_up = loaded["model.layers.1.mlp.experts.gate_up_proj"]
    down = loaded["model.layers.1.mlp.experts.down_proj"]
    for name, truth in {"gate": gate_up[:, :32], "up": gate_up[:, 32:], "down": down}.items():
        assert np.array_equal(gguf_file.widened(np.stack(pieces[f"blk.1.ffn_{name}_exps"])), truth.numpy())


def test_rows_are_the_same_for_every_engine_and_batch() -> None:
    one, other = job(Path("a"), "a"), job(Path("b"), "b")
    assert one.rows(1)[0] == other.rows(8)[0]
    assert len({tuple(row) for row in one.rows(8)}) == 8
    assert {len(row) for row in one.rows(8)} == {6 + 1 + 3}


def test_steps_follow_the_prompt_and_warmup_is_not_counted() -> None:
    fed: list[int] = []
    times = time_steps(fed.append, job(Path("a"), "a"))
    assert fed == [6, 7, 8, 9]
    assert len(times) == 3


def test_summary_and_ratios() -> None:
    def result(engine: str, tokens: int, k_active: int, ms: list[float], policy: str = "brief") -> dict[str, Any]:
        return {"engine": engine, "wait_policy": policy, "points": [{"tokens": tokens, "k_active": k_active, "ms": ms}]}

    rounds = [
        result("ours", 1, 9, [1, 2, 90]),
        result("peer", 1, 32, [8, 8, 8]),
        result("ours", 8, 9, [5]),
        result("ours", 1, 9, [4, 4, 4]),
        result("ours", 1, 9, [5, 6, 7]),
        result("ours", 1, 9, [9, 9, 9], "default"),
        result("peer", 1, 32, [6, 6, 6], "default"),
    ]
    runs = report.summarise(rounds)
    assert runs[0] == {
        "engine": "ours",
        "tokens": 1,
        "k_active": 9,
        "wait_policy": "brief",
        "ms": 4,
        "ms_spread": [2, 6],
        "ms_rounds": [2, 4, 6],
    }
    assert len(runs) == 5
    lines = report.table(report.best(runs), "ours").splitlines()
    # Each at its better policy.
    assert lines[2:] == [
        "| 1 | ours | 9 | brief | 4.0 (2.0 to 6.0) | 1.50 |",
        "| 1 | peer | 32 | default | 6.0 (6.0 to 6.0) | 1.00 |",
        "| 8 | ours | 9 | brief | 5.0 (5.0 to 5.0) |  |",
    ]


def script(folder: Path, content: str) -> Path:
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{content}\n")
    file.chmod(0o755)
    return file


def test_a_crash_names_its_signal_and_engines_do_not_see_our_thread_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("HOME_OF_TEST", "kept")
    python = script(tmp_path, 'echo "[$OMP_NUM_THREADS] $HOME_OF_TEST $MINE"; kill -ILL $$')
    with pytest.raises(bench_decode.Failed, match=r"signal 4: \[\] kept given"):
        bench_decode.run(python, ["x"], {"MINE": "given"}, tmp_path / "log")


def test_peers_that_fail_or_compute_something_else_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = script(tmp_path, "exit 1")

    def timed(engine: bench_decode.Engine, policy: str, number: int, args: Any, vocabulary: int) -> dict[str, Any]:
        if engine.name == bench_decode.LLAMA or (engine.name, policy, number) == (bench_decode.VLLM, "brief", 1):
            raise bench_decode.Failed("signal 4")
        logits = np.array([1, 2, 3] if engine.name != bench_decode.VLLM else [3, 1, 2], np.float32)
        np.save(args.work / f"{engine.name}.logits.npy", logits)
        points = [{"tokens": 1, "k_active": 32, "ms": [1.0]}]
        done = {"engine": engine.name, "wait_policy": policy, "points": points}
        return done | {"versions": {}, "notes": {}, "machine": {"cores": 2}}

    monkeypatch.setattr(bench_decode, "time_engine", timed)
    monkeypatch.setattr(bench_decode, "prepare", lambda args: bench_decode.Model(tmp_path, tmp_path, 3))
    out = tmp_path / "out.json"
    common = ["--work", str(tmp_path), "--out", str(out), "--rounds", "2"]
    assert bench_decode.main([*common, "--llama-python", str(python), "--vllm-python", str(python)]) == 1
    written = json.loads(out.read_text())
    assert [run["engine"] for run in written["runs"]] == ["transformers", "moe-prism", "vllm"]
    assert {run["engine"]: len(run["ms_rounds"]) for run in written["runs"]} == {
        "transformers": 2,
        "moe-prism": 2,
        "vllm": 2,
    }
    # llama.cpp always fails and is given up, vLLM goes on after one failure.
    assert written["failed"] == {"llama.cpp": ["signal 4"] * 2, "vllm": ["signal 4"]}
    assert {entry["engine"]: entry["ok"] for entry in written["agreement"]} == {"moe-prism": True, "vllm": False}
    assert written["machine"] == {"cores": 2}
    printed = capsys.readouterr().out
    assert "llama.cpp: FAILED 2 times, at last: signal 4" in printed
    assert "vllm: COMPUTES SOMETHING ELSE" in printed
    assert bench_decode.main(common) == 0
    assert json.loads(out.read_text())["left_out"] == ["llama.cpp", "vllm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds must be from 1 to 99, got 0"),
        (["--context", "10"], "--context must be from 22 to 478 with 4 + 32 steps, got 10"),
        (["--llama-python", "/nowhere"], "give ENV/bin/python"),
    ],
)
def test_impossible_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_decode.parse(arguments)
    assert message in capsys.readouterr().err

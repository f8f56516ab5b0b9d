from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from fake_device import FakeDevice
from making import logits
from packing import packed
from tiny import tokens
from typer.testing import CliRunner

import moe_prism.offload.accelerator
from moe_prism import load_elastic
from moe_prism.cli.app import app
from moe_prism.elastic import budget, full_budget
from moe_prism.errors import PrismError
from moe_prism.offload import load_offloaded
from moe_prism.offload.accelerator import open_accelerator
from moe_prism.offload.guessing import Guessing
from moe_prism.offload.load import manager_of
from moe_prism.offload.room import DEVICE_WORKING, token_bytes

SKIPS = {"solver": "importance", "neurons": "gate-first", "neuron_block": 2, "compensation_budgets": 2}


def away(elastic: Path, packed: Path) -> dict[str, Any]:
    """What the script found; a process of its own, since its device is there for good."""
    script = Path(__file__).parent / "away.py"
    done = subprocess.run([sys.executable, str(script), elastic, packed], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("family", "changes"), [("olmoe", {}), ("gpt_oss", {}), ("olmoe", SKIPS)])
def test_nothing_on_a_device_meets_what_is_on_the_cpu(family: str, changes: dict[str, Any], tmp_path) -> None:
    folder = tmp_path / ("gate-first" if changes else family)
    made = packed(family, folder, **changes)
    renamed = made.elastic.rename(folder / f"elastic-{folder.name}")
    found = away(renamed, made.packed)
    assert found["strict"]
    assert found["device"] == "away:0"
    assert found["places"][0] == found["places"][1]
    assert (found["pinned"], found["left"]) == (found["bytes"], 0)
    assert max(found["differences"]) < 1e-4
    assert found["equal"]
    assert 0 < found["mean_budget"][0] <= found["mean_budget"][1]
    assert all(0 < rate <= 1 for rate in found["plan"])
    assert found["predicted"] > 0


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v3"])
def test_a_model_on_a_device_writes_what_the_one_in_memory_writes(family: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Guessing, "worth", True)
    made = packed(family, tmp_path)
    original = load_elastic(made.elastic, executor="reference", fast_linear=False)
    full, device = full_budget(original), FakeDevice(0.0, used=5_000_000)
    layout = manager_of(load_offloaded(made.packed, 8_000_000_000)).layout
    needs = device.used + DEVICE_WORKING + 32 * token_bytes(original)
    model = load_offloaded(made.packed, needs + (full + 3) * layout.stride, device=device, context=32)
    manager = manager_of(model)
    assert manager.cache.slots == full + 3
    for k_active in (1, full // 2, full):
        with budget(original, k_active), budget(model, k_active):
            assert (logits(model) - logits(original)).abs().max() < 1e-4
            wanted = original.generate(tokens(1, 5), max_new_tokens=12, do_sample=False)
            assert torch.equal(model.generate(tokens(1, 5), max_new_tokens=12, do_sample=False), wanted)
    assert manager.statistics.misses > 0
    assert device.pinned == layout.blocks * layout.stride
    manager.close()
    assert device.pinned == 0
    with pytest.raises(PrismError, match=r"too small.*it takes \d\.\d\d GB.*raise --memory"):
        load_offloaded(made.packed, needs + (full - 1) * layout.stride, device=device, context=32)
    assert device.pinned == 0


def test_what_a_device_or_the_host_cannot_hold_is_refused_before_weights_are_read(tmp_path, monkeypatch) -> None:
    made = packed("olmoe", tmp_path, shadow_bits=4)
    (made.packed / "resident.safetensors").unlink()  # would be missed
    device = FakeDevice(memory=3_000_000_000)
    with pytest.raises(PrismError, match=r"4\.00 GB is more than cpu has, 3\.00 GB; lower --memory"):
        load_offloaded(made.packed, 4_000_000_000, device=device)
    with pytest.raises(PrismError, match="blocks at 4 bits are for the CPU"):
        load_offloaded(made.packed, 1_000_000_000, device=device, shadow=0.5)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=(1 << 30) + 5000))
    with pytest.raises(PrismError, match=r"they take 0\.00 GB, and 0\.00 GB can be had; free some, or leave out --dev"):
        load_offloaded(made.packed, 1_000_000_000, device=device)


def test_devices_that_are_not_there_are_refused(monkeypatch) -> None:
    for name in ("cpu", "gpu", "cuda:", "cuda:-1", "cuda:x"):
        with pytest.raises(PrismError, match=rf"device must be cuda or cuda:N, got '{name}'"):
            open_accelerator(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PrismError, match=r"device cuda:0 cannot be used: .*leave out --device"):
        open_accelerator("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(PrismError, match=r"no device cuda:2: give one of cuda:0 \.\. cuda:1"):
        open_accelerator("cuda:2")
    assert open_accelerator("cuda:1").device == torch.device("cuda", 1)


@pytest.mark.parametrize("command", ["generate", "plan"])
def test_the_commands_run_on_a_device(command: str, tmp_path, monkeypatch) -> None:
    made = packed("olmoe", tmp_path)
    opened: list[str] = []
    monkeypatch.setattr(
        moe_prism.offload.accelerator, "open_accelerator", lambda name: opened.append(name) or FakeDevice(0.0)
    )
    (tmp_path / "text.txt").write_text("the sea was calm and the old captain said nothing . " * 20)
    options = {
        "generate": ["--prompt", "the sea", "--max-new-tokens", "8"],
        "plan": ["--text", str(tmp_path / "text.txt"), "--tokens", "40", "--budgets", "4,16"],
    }[command]
    device = ["--memory", "2GB", "--device", "cuda:1"]
    done = CliRunner().invoke(app, [command, str(made.packed), *options, *device])
    assert done.exit_code == 0, done.output
    assert opened == ["cuda:1"]
    if command == "plan":
        assert "64 of 64 blocks fit; the bus gives" in done.stdout
        return
    whole = CliRunner().invoke(app, [command, str(made.elastic), *options])
    assert done.stdout == whole.stdout
    timed = CliRunner().invoke(app, [command, str(made.packed), *options, *device, "--tpot-ms", "1000"])
    assert timed.exit_code == 0, timed.output
    assert "mean budget" in timed.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda"], "needs --memory"),
        (["--device", "gpu", "--memory", "4GB"], "got 'gpu'"),
        (["--device", "cuda", "--memory", "4GB", "--k-stored", "2"], "blocks at 4 bits"),
    ],
)
def test_options_that_do_not_go_with_a_device_are_refused_before_anything_is_opened(options, message, tmp_path) -> None:
    done = CliRunner().invoke(app, ["generate", str(tmp_path / "nowhere"), "--prompt", "a", *options])
    assert isinstance(done.exception, PrismError)
    assert message in str(done.exception)

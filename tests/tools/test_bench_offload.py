"""The parts of tools/bench_offload.py that need no other engine and no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from making import recipe, save_stock
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_offload
from decode_bench.gguf_file import widened
from offload_bench import llama, llama_gguf, memory_group, report
from offload_bench.job import disk_bytes, peak_rss

from moe_prism import make_elastic
from moe_prism.offload import pack_checkpoint

ARGS = ["--checkpoint", "c", "--text", "t", "--memory", "4", "8", "--llama-python", "/python", "--soak", "0"]


def test_llama_gets_the_weights_of_the_checkpoint_that_was_packed(tmp_path: Path) -> None:
    stock = save_stock(tmp_path / "stock", tie_word_embeddings=False)
    AutoModelForCausalLM.from_pretrained(stock, dtype=torch.bfloat16).save_pretrained(stock)
    make_elastic(str(stock), tmp_path / "elastic", recipe(num_sub_experts=1))
    pack_checkpoint(tmp_path / "elastic", tmp_path / "packed")
    described = json.loads(json.dumps(llama.pieces(tmp_path / "packed")))
    found = llama_gguf.weights(described)
    wanted = load_file(tmp_path / "elastic" / "model.safetensors")
    assert wanted.keys() == found.keys()
    assert any(".experts.3.down_proj" in name for name in found)
    for name, weight in wanted.items():
        assert weight.dtype == torch.bfloat16
        assert np.array_equal(widened(found[name]), weight.float().numpy()), name
    assert described["config"]["model_type"] == "olmoe"


def test_llama_runs_all_experts_beside_the_uniform_rows_only() -> None:
    found = bench_offload.jobs(bench_offload.parse([*ARGS, "--engines", report.WHOLE, report.LLAMA]))
    rows = [(routing, job) for engine, routing, job in found if engine == report.LLAMA]
    assert [(routing, job.k_active, job.memory) for routing, job in rows] == [
        ("uniform", 8, 4_000_000_000),
        ("uniform", 8, 8_000_000_000),
    ]
    assert rows[0][1].options == {"python": "/python"}
    assert sum(engine == report.WHOLE for engine, _, _ in found) == 8


def test_only_the_forms_that_engines_need_are_written() -> None:
    def names(*engines: str) -> list[str]:
        args = bench_offload.parse([*ARGS, "--layers", "3", "--engines", *engines])
        return [path.name for path in bench_offload.forms(args)]

    assert names(report.LLAMA) == ["olmoe-3-layers-n1", "olmoe-3-layers.gguf"]
    assert names(report.LRU, report.ACCELERATE) == [f"olmoe-3-layers-{form}" for form in ("n4", "n1", "accelerate")]
    assert sum(bench_offload.forms(bench_offload.parse(ARGS)).values()) == pytest.approx(58e9, rel=0.03)


def test_llama_is_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no --llama-python" in str(llama.refusal(None))

    def cannot(limit: int) -> None:
        raise memory_group.NoLimit("no group here")

    monkeypatch.setattr(llama, "memory_group", cannot)
    assert str(llama.refusal(Path("/python"))).startswith("no group here, and without a limit")


def test_a_row_without_hits_or_stalls_has_a_place_in_the_table() -> None:
    row = dict.fromkeys(report.FIELDS) | {
        "engine": report.LLAMA,
        "routing": "uniform",
        "memory_gb": 4.0,
        "k_active": 32,
        "ms_per_token": 5000.0,
        "disk_mb_per_token": 1600.0,
        "peak_rss_gb": 3.9,
    }
    whole = row | {"engine": report.WHOLE, "ms_per_token": 1000.0, "hit_rate": 0.1, "stall_ms": 900.0}
    whole |= {"read_gbs": 1.0, "raw_read_gbs": 1.1, "ahead_per_token": 0.0}
    lines = report.table([whole, row]).splitlines()
    assert lines[3] == "| uniform | 4 | 32 | llama.cpp, mmap | 5,000 | 5.00 |  |  |  | 1,600 |  | 3.90 |"


def test_the_own_group_is_found_where_the_controller_is_mounted() -> None:
    cgroups = "8:pids:/\n4:cpu,memory:/jobs/one:two\n0::/\n"
    mounts = (
        "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/pids cgroup rw,pids 0 0\n"
        "cgroup /sys/fs/cgroup/memory cgroup rw,relatime,cpu,memory 0 0\n"
    )
    assert memory_group.own_group(cgroups, mounts) == Path("/sys/fs/cgroup/memory/jobs/one:two")
    with pytest.raises(memory_group.NoLimit, match="no memory controller"):
        memory_group.own_group("0::/user.slice\n", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n")


def test_pages_of_a_file_count_and_the_limit_holds(tmp_path: Path) -> None:
    limit, size = 96 << 20, 160 << 20
    file = tmp_path / "large"
    file.write_bytes(os.urandom(1 << 20) * (size >> 20))
    llama.forget_pages(file)
    read = "import sys\nwith open(sys.argv[1], 'rb') as file:\n  while file.read(1 << 20): pass"
    try:
        with memory_group.memory_group(limit) as group:
            subprocess.run(group.command([sys.executable, "-c", read, str(file)]), check=True)
            assert limit * 0.9 < group.most <= limit  # a process of some MB, the rest is the file
            assert group.reached > 0
            folder = group.folder
    except memory_group.NoLimit as reason:
        pytest.skip(f"no limit can be set here: {reason}")
    assert not folder.exists()


def test_what_a_process_has_had_is_read_from_the_system(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(8 << 20))
    llama.forget_pages(file)
    before = disk_bytes()
    file.read_bytes()
    if disk_bytes() == before:
        pytest.skip("this file system reads no disk")
    assert disk_bytes() - before >= 8 << 20
    assert peak_rss() > 20 << 20

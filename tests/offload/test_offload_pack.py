from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch
from making import recipe, save_stock
from packing import block_file, packed
from safetensors.torch import load_file

from moe_prism import make_elastic
from moe_prism.checkpoint.checksums import verify_sums
from moe_prism.errors import CheckpointError, PrismError
from moe_prism.experts import find_expert_layers
from moe_prism.experts.neurons import down, gate_up
from moe_prism.offload import pack, pack_checkpoint
from moe_prism.offload.block_file import MAGIC, BlockFile, aligned, read_layout


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_a_block_holds_the_rows_of_its_neurons(family: str, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    made = packed(family, tmp_path)
    verify_sums(made.elastic)  # only read
    model = AutoModelForCausalLM.from_pretrained(made.elastic, dtype=torch.float32)
    with BlockFile(made.packed / "blocks") as file:
        layout = file.layout
        memory = aligned(layout.stride)
        for number, layer in enumerate(find_expert_layers(model)):
            for expert in (0, layer.num_experts - 1):
                for part in range(4):
                    file.read(number * layout.per_layer + expert * 4 + part, memoryview(memory))
                    rows = torch.from_numpy(memory.view("f4").copy()).view(-1, layer.hidden_size)
                    mine = slice(part * layout.neurons, (part + 1) * layout.neurons)
                    expected = torch.cat([gate_up(layer.module, expert, mine), down(layer.module, expert, mine)])
                    assert torch.equal(rows[: layout.rows], expected)
    names = set(load_file(made.packed / "resident.safetensors"))
    assert not any(name.endswith(("gate_up_proj", "down_proj")) and "experts." in name for name in names)


def test_a_killed_run_goes_on_after_its_last_whole_block(tmp_path, monkeypatch) -> None:
    stock = save_stock(tmp_path / "stock", "olmoe")
    make_elastic(str(stock), tmp_path / "elastic", recipe())
    pack_checkpoint(tmp_path / "elastic", tmp_path / "whole")
    layers = []

    def stop_after_one(done: int, total: int) -> None:
        layers.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_checkpoint(tmp_path / "elastic", tmp_path / "packed", progress=stop_after_one)
    assert not (tmp_path / "packed").exists()
    with pytest.raises(CheckpointError, match="is not finished; run the same"):
        BlockFile(tmp_path / ".packed.packing" / "blocks")
    written = []
    contents = pack._contents
    monkeypatch.setattr(pack, "_contents", lambda layer, layout: written.append(layer.name) or contents(layer, layout))
    pack_checkpoint(tmp_path / "elastic", tmp_path / "packed")
    assert len(written) == 1  # the second layer only
    assert (tmp_path / "packed" / "blocks").read_bytes() == (tmp_path / "whole" / "blocks").read_bytes()
    assert not (tmp_path / ".packed.packing").exists()


def test_a_full_disk_leaves_no_output_and_the_next_run_finishes(tmp_path, monkeypatch) -> None:
    stock = save_stock(tmp_path / "stock", "olmoe")
    make_elastic(str(stock), tmp_path / "elastic", recipe())
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(PrismError, match="free"):
            pack_checkpoint(tmp_path / "elastic", tmp_path / "packed")
    contents = pack._contents

    def full(layer, layout):
        for number, content in enumerate(contents(layer, layout)):
            if number == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield content

    with monkeypatch.context() as patch:
        patch.setattr(pack, "_contents", full)
        with pytest.raises(OSError, match="No space left"):
            pack_checkpoint(tmp_path / "elastic", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    pack_checkpoint(tmp_path / "elastic", tmp_path / "packed")
    BlockFile(tmp_path / "packed" / "blocks").close()


def test_what_cannot_be_packed_is_refused_before_any_work(tmp_path) -> None:
    stock = save_stock(tmp_path / "stock", "olmoe")
    with pytest.raises(CheckpointError, match="stock model"):
        pack_checkpoint(stock, tmp_path / "packed")
    make_elastic(str(stock), tmp_path / "elastic", recipe(gate="proxy", gate_options={"gate_neurons": 2}))
    with pytest.raises(PrismError, match="gate: static or gate: linear"):
        pack_checkpoint(tmp_path / "elastic", tmp_path / "packed")
    assert not list(tmp_path.glob("*packed*"))


def test_a_block_file_that_is_not_whole_is_refused(tmp_path) -> None:
    path = tmp_path / "blocks"
    layout = block_file(path)
    whole = path.read_bytes()
    for content, message in (
        (b"something else", "not a block file"),
        (whole[:-1], f"{layout.file_bytes - 1} bytes instead of {layout.file_bytes}"),
        (whole[:40] + b"#" + whole[41:], "altered or truncated in its header"),
        (whole[:10], "not a block file"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            BlockFile(path)
    future = layout.model_copy(update={"version": 9})
    path.write_bytes(future.header() + whole[len(layout.header()) :])
    with pytest.raises(CheckpointError, match=r"schema version 9.*upgrade"):
        read_layout(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_layout(tmp_path / "absent")
    assert whole.startswith(MAGIC)

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from making import WORDS, recipe, save_stock
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moe_prism import make_elastic
from moe_prism.checkpoint.read import open_checkpoint
from moe_prism.checkpoint.restore import restore_checkpoint
from moe_prism.errors import PrismError
from moe_prism.experts import find_expert_layers
from moe_prism.refactor import Recipe, pipeline
from moe_prism.refactor.calibration import load_calibration


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(path.name.encode() + path.read_bytes())
    return total.hexdigest()


def tensors_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "moe_prism" / "tensors.safetensors") | load_file(out / "model.safetensors")


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    return save_stock(tmp_path / "stock")


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_a_bf16_checkpoint_comes_out_as_bf16_and_restores_bit_for_bit(dtype, tmp_path) -> None:
    stock = save_stock(tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(stock, dtype=torch.bfloat16)
    model.save_pretrained(stock)
    before = digest(stock)
    make_elastic(stock, tmp_path / "out", recipe(), compute_dtype=dtype)
    assert digest(stock) == before
    out = open_checkpoint(tmp_path / "out")
    assert out.elastic.weights_dtype == "bfloat16"
    permuted = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(stock / "model.safetensors")
    assert permuted.keys() == original.keys()
    assert {v.dtype for v in permuted.values()} == {torch.bfloat16}
    assert any(not torch.equal(permuted[n], original[n]) for n in original)
    restore_checkpoint(tmp_path / "out", tmp_path / "back")
    for name, value in load_file(tmp_path / "back" / "model.safetensors").items():
        assert torch.equal(value, original[name]), name
    assert "moe_prism" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_the_same_recipe_gives_the_same_checkpoint_and_another_seed_another(stock, tmp_path) -> None:
    make_elastic(stock, tmp_path / "a", recipe(solver="balanced"))
    make_elastic(stock, tmp_path / "b", recipe(solver="balanced"))
    make_elastic(stock, tmp_path / "c", recipe(solver="balanced", seed=1))
    a, b, c = (tensors_of(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_neurons_lie_by_importance_and_gate_neurons_first(stock, tmp_path) -> None:
    make_elastic(stock, tmp_path / "out", recipe(solver="importance", impact="output", gate="static"))
    importance = tensors_of(tmp_path / "out")["model.layers.0.mlp.experts.importance"]
    assert (importance.diff(dim=1) <= 1e-6).all()


@pytest.mark.parametrize("source", ["file", "folder", None])
def test_calibration_sources(source, stock, tmp_path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(WORDS * 200)
    text = {"file": str(tmp_path / "texts" / "a.txt"), "folder": str(tmp_path / "texts"), None: None}[source]
    make_elastic(stock, tmp_path / "out", recipe(), text=text)
    calibration = open_checkpoint(tmp_path / "out").elastic.calibration
    assert calibration.tokens == 512
    assert calibration.text == {"file": "texts/a.txt", None: "sampled from the model"}.get(source, calibration.text)
    assert str(tmp_path) not in calibration.text


def test_sampled_calibration_depends_on_the_seed_alone(stock) -> None:
    model = AutoModelForCausalLM.from_pretrained(stock, dtype=torch.float32)
    one, two, other = (load_calibration(None, None, model, 256, 32, seed).windows for seed in (0, 0, 1))
    assert one.shape == (8, 32)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


BAD = [
    ({"num_sub_experts": 5}, {}, "num_sub_experts must divide the 16 neurons of an expert, got 5; possible: 1, 2, 4"),
    (
        {"neurons": "gate-first", "neuron_block": 3},
        {},
        "neuron_block must divide the 4 neurons of a sub-expert, got 3; possible: 1, 2, 4; or change num_sub_experts",
    ),
    ({"switched_off": 4}, {}, "switched_off must be from 1 to 3"),
    ({"solver": "magic"}, {}, "unknown solver 'magic'; known: annealing"),
    ({"gate": "magic"}, {}, "unknown gate 'magic'; known: linear"),
    ({}, {"text": "EMPTY"}, "empty"),
    ({}, {"text": "TINY"}, "at least 256 are needed"),
    ({}, {"text": "./nowhere.txt"}, "no such calibration text"),
    ({}, {"source": "NOWHERE"}, "cannot be loaded"),
    ({}, {"source": "EMPTYDIR"}, "no config.json"),
]


@pytest.mark.parametrize(("fields", "how", "message"), BAD)
def test_bad_input_is_refused_and_nothing_is_written(fields, how, message, stock, tmp_path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "tiny.txt").write_text("the sea")
    (tmp_path / "emptydir").mkdir()
    names = {"EMPTY": "empty.txt", "TINY": "tiny.txt", "EMPTYDIR": "emptydir", "NOWHERE": "nowhere"}
    how = {k: str(tmp_path / names[v]) if v in names else v for k, v in how.items()}
    with pytest.raises(PrismError, match=message):
        make_elastic(how.get("source", stock), tmp_path / "out", recipe(**fields), text=how.get("text"))
    assert not (tmp_path / "out").exists()


def test_an_elastic_checkpoint_is_not_refactored_again(stock, tmp_path) -> None:
    make_elastic(stock, tmp_path / "out", recipe())
    with pytest.raises(PrismError, match="elastic already"):
        make_elastic(tmp_path / "out", tmp_path / "again", recipe())


def test_a_taken_output_is_refused_before_the_model_is_loaded(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(PrismError, match="not empty"):
        make_elastic(tmp_path / "no model here", tmp_path / "out", recipe())
    assert (tmp_path / "out" / "mine.txt").read_text() == "x"


def test_too_little_disk_is_noticed_before_any_forward(stock, tmp_path, monkeypatch) -> None:
    import shutil

    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=1000))
    with pytest.raises(PrismError, match="not enough disk space"):
        make_elastic(stock, tmp_path / "out", recipe())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["stock"]


KILLED = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
from making import recipe
from moe_prism import make_elastic
from moe_prism.refactor import pipeline
stage, at = {stage!r}, {at}
def tell(name, done, total):
    if (name, done) == (stage, at):
        os.kill(os.getpid(), signal.SIGKILL)
make_elastic({stock!r}, {out!r}, recipe(solver="balanced"), progress=tell)
"""


@pytest.mark.parametrize(("stage", "at"), [("sample", 16), ("capture", 1), ("layers", 1), ("layers", 2)])
def test_kill_9_leaves_the_input_alone_and_the_next_run_resumes(
    stage: str, at: int, stock, tmp_path, monkeypatch
) -> None:
    before = digest(stock)
    out = tmp_path / "out"
    script = KILLED.format(tests=str(Path(__file__).parents[1]), stage=stage, at=at, stock=str(stock), out=str(out))
    ended = subprocess.run([sys.executable, "-c", script], timeout=200)
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists()
    assert digest(stock) == before
    layers = sorted((tmp_path / "out.partial").glob("layers/layer-*.safetensors"))
    assert len(layers) == (at if stage == "layers" else 0)
    refactored, stages = [], []
    inner = pipeline.refactor_layer
    monkeypatch.setattr(pipeline, "refactor_layer", lambda *a: refactored.append(a[1]) or inner(*a))
    make_elastic(stock, out, recipe(solver="balanced"), progress=lambda name, *_: stages.append(name))
    assert ("sample" in stages) == (stage == "sample")
    if (stage, at) == ("layers", 2):
        assert "capture" not in stages
    assert refactored == list(range(len(layers), 2))
    assert not (tmp_path / "out.partial").exists()
    make_elastic(stock, tmp_path / "whole", recipe(solver="balanced"))
    resumed, whole = tensors_of(out), tensors_of(tmp_path / "whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_another_recipe_does_not_reuse_what_was_begun(stock, tmp_path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "layers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_elastic(stock, tmp_path / "out", recipe(seed=0), progress=stop)
    make_elastic(stock, tmp_path / "out", recipe(seed=3))
    make_elastic(stock, tmp_path / "fresh", recipe(seed=3))
    a, b = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "fresh")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_an_unreached_expert_is_reported_and_the_checkpoint_is_whole(stock, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(stock, dtype=torch.float32)
    layer = find_expert_layers(model)[0]
    with torch.no_grad():
        norm = model.model.layers[0].post_attention_layernorm.weight
        norm.zero_()  # the router sees zeros: all experts equal, the first four are taken
    model.save_pretrained(stock)
    done = make_elastic(stock, tmp_path / "out", recipe())
    assert done.reports[0].fallbacks
    assert len(done.reports[0].fallbacks) == layer.num_experts - layer.top_k
    assert json.loads((tmp_path / "out/moe_prism/layers.json").read_text())[0]["fallbacks"]
    open_checkpoint(tmp_path / "out")


def test_results_do_not_depend_on_the_number_of_cores(stock, tmp_path, monkeypatch) -> None:
    make_elastic(stock, tmp_path / "all", recipe(solver="balanced"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    make_elastic(stock, tmp_path / "one", recipe(solver="balanced"))
    a, b = tensors_of(tmp_path / "all"), tensors_of(tmp_path / "one")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_recipes_round_trip_and_name_every_bad_field(tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(gate="proxy", gate_options={"gate_neurons": 2}).to_yaml())
    assert Recipe.load(path) == recipe(gate="proxy", gate_options={"gate_neurons": 2})
    path.write_text("")
    assert Recipe.load(path) == Recipe()
    path.write_text("num_sub_experts: 0\nsolvr: greedy\n")
    with pytest.raises(PrismError, match=r"num_sub_experts.*solvr.*Fields: num_sub_experts"):
        Recipe.load(path)
    path.write_text("- a list")
    with pytest.raises(PrismError, match="must be a mapping"):
        Recipe.load(path)
    path.write_text("a: [")
    with pytest.raises(PrismError, match="cannot be read"):
        Recipe.load(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"neuron_block": 0}, "neuron_block: Input should be greater than or equal to 1"),
        ({"neuron_block": 8}, "neuron_block: 8 needs neurons: gate-first, got auto; or set neuron_block: 1"),
        ({"neuron_block": 8, "neurons": "all"}, "needs neurons: gate-first, got all"),
        ({"neuron_block": 8, "neurons": "gate-first", "methods": "auto"}, "methods: given or neuron_block: 1"),
        ({"neuron_block": 8, "neurons": "gate-first", "shadow_bits": 4}, "neuron_block: 8 needs shadow_bits: 0"),
        ({"neuron_block": 8, "neurons": "gate-first", "finetune": {"steps": 1}}, "trains single neurons"),
    ],
)
def test_blocks_are_refused_where_nothing_would_choose_them(fields, message) -> None:
    with pytest.raises(PrismError, match=message):
        Recipe.of(fields)


def test_every_recipe_field_is_documented() -> None:
    assert all(field.description for field in Recipe.model_fields.values())


def test_tensors_that_transformers_drops_are_announced(stock, tmp_path) -> None:
    tensors = load_file(stock / "model.safetensors")
    save_file(tensors | {"model.mtp.weight": torch.zeros(2)}, stock / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"1 of its tensors \(model\.mtp\.weight"):
        make_elastic(stock, tmp_path / "out", recipe())


def test_points_are_shares_of_any_full_budget() -> None:
    recipe = Recipe(points=[1.0, 0.25, 0.01, 0.5])
    assert recipe.budgets(64) == [1, 16, 32, 64]
    assert recipe.budgets(8) == [1, 2, 4, 8]  # the smallest share is one sub-expert at least
    assert Recipe().budgets(8) is None
    assert Recipe.parse(recipe.to_yaml()) == recipe
    for bad in (0, 1.5):
        with pytest.raises(PrismError, match="points"):
            Recipe.of({"points": [bad]})

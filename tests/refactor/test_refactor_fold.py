"""Folding: factors are least squares, budgets use them, full budget does not."""

from __future__ import annotations

import pytest
import torch
from making import logits, recipe, save_stock
from safetensors.torch import load_file, save_file
from tiny import tokens

from moe_prism import budget, load_elastic, make_elastic
from moe_prism.checkpoint.schema import TENSORS_FILE
from moe_prism.elastic.budgets import elastic_layers
from moe_prism.elastic.executors import EXECUTORS
from moe_prism.elastic.folding import folded
from moe_prism.elastic.selection import Selection
from moe_prism.errors import CheckpointError, PrismError
from moe_prism.refactor import Recipe, fold


def pairs(token: list[int], slot: list[int], sub_expert: list[int], weight: list[float]) -> Selection:
    return Selection(torch.tensor(token), torch.tensor(slot), torch.tensor(sub_expert), torch.tensor(weight))


def test_weights_are_scaled_by_how_many_of_an_expert_run() -> None:
    factors = torch.tensor([[9.0, 2.0, 1.0], [9.0, 3.0, 1.0]])  # two experts of two sub-experts
    index = torch.tensor([[0, 1], [1, 0]])
    selection = pairs([0, 1, 0, 1, 1], [0, 1, 1, 0, 0], [0, 1, 2, 2, 3], [0.5, 0.25, 0.5, 0.75, 0.75])
    found = folded(selection, factors, index)
    assert found.weight.tolist() == [1.0, 0.5, 1.5, 0.75, 0.75]
    assert all(torch.equal(a, b) for a, b in zip(found[:3], selection[:3], strict=True))


@pytest.mark.parametrize(("family", "gate"), [("olmoe", "static"), ("gpt_oss", "linear")])
def test_factors_are_those_of_least_squares(family: str, gate: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(fold, "_RIDGE", 0.0)
    make_elastic(save_stock(tmp_path / "stock", family), tmp_path / "out", recipe(gate=gate, solver="importance"))
    model = load_elastic(tmp_path / "out", executor="reference", fast_linear=False)
    windows, seen = tokens(3, 40), []
    layer, state = elastic_layers(model)[1]
    handle = layer.module.register_forward_hook(
        lambda _, args, kw, out: seen.append((*args, *kw.values())[:3]), with_kwargs=True
    )
    factors = fold.fit_folding(model, windows)[layer.name]
    handle.remove()
    n, reference = state.num_sub_experts, EXECUTORS.create("reference")
    assert torch.equal(factors[:, n], torch.ones(layer.num_experts))
    whole: dict[tuple[int, int], list[torch.Tensor]] = {}
    for x, index, weights in seen:
        scores = state.gate.score(layer.module, state.on(x.device), x, index, n).values
        for t in range(len(x)):
            for s, expert in enumerate(index[t].tolist()):
                order = scores[t, s].argsort(descending=True, stable=True).tolist()
                for m in range(1, n + 1):
                    parts = sorted(expert * n + part for part in order[:m])
                    chosen = pairs([0] * m, [0] * m, parts, [float(weights[t, s])] * m)
                    whole.setdefault((expert, m), []).append(reference.run(layer.module, x[t : t + 1], chosen, n)[0])
    for expert, m in whole:
        some, every = (torch.cat(whole[expert, count]).double() for count in (m, n))
        wanted = torch.linalg.lstsq(some[:, None], every[:, None]).solution.item()
        assert float(factors[expert, m]) == pytest.approx(wanted, rel=2e-3, abs=2e-3)


def test_a_folded_checkpoint_scales_below_full_budget_only(tmp_path) -> None:
    stock = save_stock(tmp_path / "stock")
    for name, changes in (
        ("plain", {}),
        ("folded", {"fold": True}),
        ("both", {"fold": True, "compensation_budgets": 2}),
    ):
        make_elastic(stock, tmp_path / name, recipe(solver="importance", gate="static", **changes))
    plain, scaled = (load_elastic(tmp_path / name, fast_linear=False) for name in ("plain", "folded"))
    assert (logits(plain) - logits(scaled)).abs().max() < 1e-5  # full budget is the original
    (_, state), (_, without) = elastic_layers(scaled)[0], elastic_layers(plain)[0]
    assert without.fold is None
    assert state.fold is not None
    with budget(plain, 7), budget(scaled, 7):
        assert (logits(plain) - logits(scaled)).abs().max() > 1e-4
        found = {}
        for executor in ("reference", "cpu", "grouped"):
            state.dial.executor = executor
            found[executor] = logits(scaled)
        assert all((other - found["reference"]).abs().max() < 1e-4 for other in found.values())
    state.fold = torch.ones_like(state.fold)
    elastic_layers(scaled)[1][1].fold = None
    with budget(plain, 7), budget(scaled, 7):
        assert (logits(plain) - logits(scaled)).abs().max() < 1e-4  # nothing but the factors differs
    assert elastic_layers(load_elastic(tmp_path / "both"))[0][1].compensation is not None


def test_a_missing_factor_and_what_cannot_be_folded_are_refused(tmp_path) -> None:
    make_elastic(save_stock(tmp_path / "stock"), tmp_path / "out", recipe(fold=True))
    file = tmp_path / "out" / TENSORS_FILE
    save_file({name: value for name, value in load_file(file).items() if not name.endswith(".fold")}, file)
    with pytest.raises(CheckpointError, match=r"no tensor .*\.fold"):
        load_elastic(tmp_path / "out", verify=False)
    with pytest.raises(PrismError, match="set neurons: all"):
        Recipe.of({"fold": True, "neurons": "gate-first"})
    with pytest.raises(PrismError, match="set fold: false"):
        Recipe.of({"fold": True, "finetune": {"steps": 5}})

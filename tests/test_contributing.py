"""The worked examples of CONTRIBUTING.md run as printed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from moe_prism.gates import GATES, ExpertProfile
from moe_prism.refactor.solvers import SOLVERS, dropped_mass

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


def module_of_example(monkeypatch: pytest.MonkeyPatch, path: str) -> ModuleType:
    """Run the code block that the page gives for a new file, as that file; registries are restored afterwards."""
    for registry in (SOLVERS, GATES):
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    block = re.search(rf"`{re.escape(path)}`:\n\n```python\n(.*?)```", PAGE, re.DOTALL)
    assert block, f"CONTRIBUTING.md shows no {path}"
    module = ModuleType(path.removesuffix(".py").replace("/", "."))
    module.__package__ = module.__name__.rpartition(".")[0]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(block[1], path, "exec"), module.__dict__)
    return module


def test_the_solver_example_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    module_of_example(monkeypatch, "moe_prism/refactor/solvers/shuffled.py")
    impact = np.random.default_rng(0).random((50, 12), dtype=np.float32)
    one, many = (
        SOLVERS.create("shuffled", {"tries": tries}).solve(impact, num_sub_experts=4, switched_off=2, seed=0)
        for tries in (1, 200)
    )
    assert np.bincount(many).tolist() == [3, 3, 3, 3]
    assert dropped_mass(impact, many, 4, 2) < dropped_mass(impact, one, 4, 2)


def test_the_gate_example_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    module_of_example(monkeypatch, "moe_prism/gates/winners.py")
    gate = GATES.create("winners", {"floor": 0.5})
    # two sub-experts of two neurons; the second is the stronger on three tokens of four
    activations = torch.tensor(
        [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, -9.0, 0.0], [1.0, 0.0, 0.0, 2.0], [0.0, 1.0, 1.0, 1.0]]
    )
    profile = ExpertProfile(activations, torch.ones(4), torch.ones(4), torch.zeros(8))
    tensors = {name: tensor.expand(3, -1) for name, tensor in gate.fit(profile, 2).items()}
    scores = gate.score(torch.nn.Identity(), tensors, torch.zeros(5, 8), torch.tensor([[0, 2]] * 5), 2)
    assert scores.values.shape == (5, 2, 2)
    torch.testing.assert_close(scores.values[4, 1], torch.tensor([0.75, 1.25]))

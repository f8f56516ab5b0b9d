"""Which configurations of vLLM a checkpoint can be served with; without vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from making import recipe, save_stock

from moe_prism import make_elastic
from moe_prism.errors import UnsupportedModelError
from moe_prism.vllm_plugin.setup import SCHEDULER, WORKER, neuron_ranks, setup_of


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("setup")
    stock = save_stock(folder / "stock")
    for gate in ("static", "proxy"):
        make_elastic(stock, folder / gate, recipe(gate=gate))
    return {gate: folder / gate for gate in ("static", "proxy")}


def config(path: Path, **parallel: Any) -> Any:
    """As much of vLLM's as is looked at."""
    usual = {
        "worker_cls": WORKER,
        "tensor_parallel_size": 1,
        "data_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "enable_expert_parallel": False,
        "enable_eplb": False,
        "enable_dbo": False,
        "all2all_backend": "allgather_reducescatter",
        "use_sequence_parallel_moe": False,
    }
    raw = json.loads((path / "config.json").read_text())
    return SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(**raw), model=str(path), enforce_eager=True),
        parallel_config=SimpleNamespace(**{**usual, **parallel}),
        scheduler_config=SimpleNamespace(scheduler_cls=SCHEDULER),
        device_config=SimpleNamespace(device_type="cpu"),
        additional_config={},
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
        quant_config=None,
    )


@pytest.mark.parametrize(
    ("parallel", "ranks"),
    [
        ({}, 1),
        ({"tensor_parallel_size": 2}, 2),
        ({"data_parallel_size": 2}, 2),
        ({"tensor_parallel_size": 2, "data_parallel_size": 2}, 4),
        ({"tensor_parallel_size": 2, "enable_expert_parallel": True}, 1),
        ({"data_parallel_size": 8, "enable_expert_parallel": True}, 1),  # neurons need not be a multiple of 8 N
    ],
)
def test_gates_that_read_no_weights_can_be_split(
    checkpoints: dict[str, Path], parallel: dict[str, Any], ranks: int
) -> None:
    given = config(checkpoints["static"], **parallel)
    assert setup_of(given) is not None
    assert neuron_ranks(given.parallel_config) == ranks


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        ({"data_parallel_size": 3}, "neurons cannot be cut into 3"),
        ({"enable_eplb": True}, "leave out --enable-eplb"),
        ({"enable_dbo": True}, "leave out --enable-dbo"),
        ({"data_parallel_size": 2, "all2all_backend": "deepep_low_latency"}, "--all2all-backend deepep_low_latency"),
        ({"use_sequence_parallel_moe": True}, "all three kinds of parallelism"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
    ],
)
def test_what_budgets_cannot_come_along_with_is_refused(
    checkpoints: dict[str, Path], parallel: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=words):
        setup_of(config(checkpoints["static"], **parallel))


@pytest.mark.parametrize(
    "parallel",
    [
        {"data_parallel_size": 2},
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    ],
)
def test_gates_that_read_weights_cannot_be_split(checkpoints: dict[str, Path], parallel: dict[str, Any]) -> None:
    assert setup_of(config(checkpoints["proxy"])) is not None
    with pytest.raises(UnsupportedModelError, match="reads the experts' weights"):
        setup_of(config(checkpoints["proxy"], **parallel))

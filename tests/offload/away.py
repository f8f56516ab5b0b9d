"""A device whose tensors cannot be mixed with the CPU's, on the CPU: what a GPU would refuse is refused here too.

    python tests/offload/away.py ELASTIC PACKED

Every operation is looked at. Tensors of the device know their values and show another device; an operation on some of
them and some of the CPU's raises, but for what CUDA allows: copies, scalars, and positions on the CPU. The rest is
torch's own stand-in for a backend, which is of a whole process: so this is a script. It compares an offloaded model
with the one in memory and prints what it found as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

sys.path.insert(0, str(Path(__file__).parents[1]))

from fake_device import FakeDevice
from tiny import tokens

from moe_prism import load_elastic
from moe_prism.elastic import budget, full_budget
from moe_prism.offload import load_offloaded, set_deadline
from moe_prism.offload.block_file import read_layout
from moe_prism.offload.guessing import Guessing
from moe_prism.offload.load import manager_of
from moe_prism.offload.pack import BLOCKS_FILE
from moe_prism.offload.plan import plan
from moe_prism.offload.room import DEVICE_WORKING, token_bytes

_setup_privateuseone_for_python_backend("away")
torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) makes it on the CPU first
AWAY = torch.device("away", 0)
aten: Any = torch.ops.aten
MIXES = {aten.copy_.default, aten._to_copy.default}
TAKES_POSITIONS = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


class Away(Tensor):
    """A tensor there."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Away:
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device=AWAY
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        return self.inner.tolist()  # torch's own knows no subclasses

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Strict(TorchDispatchMode):
    """While it is entered, tensors can be made on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    away = any(isinstance(value, Away) for value in given)
    stays = any(not isinstance(value, Away) and value.dim() for value in given)
    if away and stays and func not in MIXES and not (func in TAKES_POSITIONS and isinstance(args[0], Away)):
        raise RuntimeError(f"{func}: tensors on {AWAY} and on the CPU")
    if func in (aten.copy_.default, aten.index_put_.default):
        away = isinstance(args[0], Away)
    elif kwargs.get("device") is not None:
        away = torch.device(kwargs["device"]).type == AWAY.type
        kwargs = kwargs | {"device": torch.device("cpu")}
    plain, named = tree_map_only(Away, lambda value: value.inner, (args, kwargs))
    out = func(*plain, **named)
    if func._schema.is_mutable and plain and out is plain[0]:
        return args[0]
    return tree_map_only(Tensor, Away, out) if away else out


class AwayDevice(FakeDevice):
    """The accelerator of it."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.device = AWAY


def attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **how: Any
) -> Tensor:
    """In the place of torch's own, which looks for a kernel by the device."""
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (how.get("scale") or query.shape[-1] ** -0.5)
    if how.get("is_causal"):
        ones = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        scores = scores.masked_fill(~ones.tril(), -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    return scores.softmax(-1) @ value


def is_strict() -> bool:
    """Whether it refuses what it is for."""
    there = torch.zeros(2, 2, device=AWAY)
    try:
        there @ torch.ones(2, 2)
    except RuntimeError as error:
        return "and on the CPU" in str(error)
    return False


@torch.no_grad()
def compare(elastic: Path, packed: Path) -> dict[str, Any]:
    """The offloaded model on the device beside the one in memory."""
    Guessing.worth = True  # type: ignore[assignment, method-assign]
    torch.nn.functional.scaled_dot_product_attention = attend
    original = load_elastic(elastic, executor="masked" if "gate-first" in elastic.name else "reference")
    full, device, layout = full_budget(original), AwayDevice(), read_layout(packed / BLOCKS_FILE)
    places, context = full + 4, 64
    memory = DEVICE_WORKING + context * token_bytes(original) + places * layout.stride
    model = load_offloaded(packed, memory, device=device, context=context)
    manager, ids = manager_of(model), tokens(1, 9)
    found: dict[str, Any] = {"strict": is_strict(), "device": str(model.device), "pinned": device.pinned}
    found |= {"places": [manager.cache.slots, places], "bytes": layout.blocks * layout.stride, "differences": []}
    for k_active in (1, full // 2, full):
        with budget(original, k_active), budget(model, k_active):
            theirs = model(ids.to(AWAY)).logits.cpu()
            found["differences"].append(float((theirs - original(ids).logits).abs().max()))
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with budget(original, full // 2), budget(model, full // 2):
        wanted = original.generate(ids, **how)
        found["equal"] = torch.equal(model.generate(ids.to(AWAY), **how).cpu(), wanted)
        pace = set_deadline(model, 1e9, 1)
        assert pace is not None
        model.generate(ids.to(AWAY), **how)
        found["mean_budget"] = [pace.mean_budget, full]
        set_deadline(model, None)
    found["plan"] = [point.hit_rate for point in plan(model, tokens(1, 40)[0], [1, full // 2]).points]
    found["predicted"] = manager.statistics.predicted
    manager.close()
    return found | {"left": device.pinned}


if __name__ == "__main__":
    with Strict():
        print(json.dumps(compare(*map(Path, sys.argv[1:]))))

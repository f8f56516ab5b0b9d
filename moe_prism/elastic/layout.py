"""A module's weights move from rows into panels, which only products with tokens need, and back.

The rows' parameters keep their shapes then and have no values (they are on torch's meta device). Whoever asks the
module for its state, moves it or loads into it meets rows. Knows nothing of checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..experts.neurons import is_plain, num_neurons
from ..huge_pages import use_huge_pages
from .executors.panels import Panels, panels_suit
from .linear import FastLinear, LinearPanels, linear_suits

_LAYOUT = "_moe_prism_layout"


@dataclass(frozen=True)
class _Layout:
    """How a module's rows come back, and what watches over it until then.

    Attributes:
        rows: the value of each parameter that has none now, from the module.
        hooks: removed with it.
    """

    rows: Callable[[nn.Module], dict[str, Tensor]]
    hooks: tuple[Any, ...]


def in_huge_pages(module: nn.Module) -> None:
    """Let a module's weights on the CPU lie in huge pages; see ``use_huge_pages``."""
    for weight in module.parameters():
        if weight.device.type == "cpu":
            use_huge_pages(weight.data_ptr(), weight.nbytes)


def lies_in_panels(module: nn.Module) -> bool:
    """Whether a module's weights are panels now."""
    return _LAYOUT in module.__dict__


def use_panels(module: nn.Module, n: int) -> bool:
    """Lay the weights of experts out in panels, in their own memory, where this CPU is faster on them.

    Args:
        module: stacked experts.
        n: sub-experts of an expert.

    Returns:
        Whether it was done.
    """
    gate_up, down = module.gate_up_proj, module.down_proj
    assert isinstance(gate_up, Tensor)
    assert isinstance(down, Tensor)
    suits = down.device.type == "cpu" and is_plain(module) and gate_up.is_contiguous()
    if not suits or not panels_suit(down.dtype, gate_up.shape[2], num_neurons(module), n):
        return False
    with torch.no_grad():
        module.panels = Panels.of(gate_up.detach(), down.detach(), n, in_place=True)  # type: ignore[assignment]
    _hide(module, _rows_of_experts)
    return True


def use_linear_panels(model: nn.Module, *, in_place: bool = False) -> None:
    """The same, one by one, for every ``FastLinear`` of a model whose weight is its own; see ``LinearPanels.of``."""
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for module in model.modules():
        if isinstance(module, FastLinear) and owners[id(module.weight)] == 1 and linear_suits(module.weight):
            with torch.no_grad():
                module.panels = LinearPanels.of(module.weight.detach(), module.bias, in_place=in_place)
            _hide(module, _row_of_linear)


def use_rows(module: nn.Module) -> None:
    """Undo it, in new memory; a module of rows stays as it is."""
    layout: _Layout | None = module.__dict__.pop(_LAYOUT, None)
    if layout is None:
        return
    for hook in layout.hooks:
        hook.remove()
    del module.__dict__["_apply"]
    for name, rows in layout.rows(module).items():
        setattr(module, name, nn.Parameter(rows, False))
    module.panels = None  # type: ignore[assignment]


def _hide(module: nn.Module, rows: Callable[[nn.Module], dict[str, Tensor]]) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.dim() > 1:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            setattr(module, name, nn.Parameter(empty, False))
    hooks = (
        module.register_state_dict_post_hook(_give_rows),
        module.register_load_state_dict_pre_hook(_before_loading),
    )
    module.__dict__[_LAYOUT] = _Layout(rows, hooks)
    module.__dict__["_apply"] = MethodType(_apply, module)


def _rows_of_experts(module: nn.Module) -> dict[str, Tensor]:
    panels: Panels = module.panels  # type: ignore[assignment]
    gate_up, down = panels.rows(num_neurons(module) // panels.n)
    return {"gate_up_proj": gate_up, "down_proj": down}


def _row_of_linear(module: nn.Module) -> dict[str, Tensor]:
    panels: LinearPanels = module.panels  # type: ignore[assignment]
    return {"weight": panels.rows()}


def _give_rows(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name, rows in module.__dict__[_LAYOUT].rows(module).items():
        state[prefix + name] = rows


def _before_loading(module: nn.Module, *_: Any) -> None:
    use_rows(module)


def _apply(module: nn.Module, move: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """In place of ``nn.Module._apply``, which ``to`` and its like call with what they do to every tensor."""
    probe = torch.empty(0, dtype=torch.bfloat16)
    moved = move(probe)
    if (moved.device, moved.dtype) == (probe.device, probe.dtype):
        return module
    use_rows(module)
    moved_rows: nn.Module = module._apply(move, recurse)
    return moved_rows

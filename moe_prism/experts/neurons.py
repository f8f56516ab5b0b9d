"""Views of single neurons in the stacked weights, whatever their layout.

A neuron is a column of gate and up and the matching row of down. ``gate_up`` returns rows in the order
that the family's own ``_apply_gate`` expects, so activation functions, clamps and interleaving stay the
model's business. Knows nothing of sub-experts or of how neurons were ordered.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def num_neurons(module: nn.Module) -> int:
    """C, the neurons of one expert."""
    weight: Tensor = module.down_proj  # type: ignore[assignment]
    return weight.shape[1] if module.is_transposed else weight.shape[2]


def gate_up(module: nn.Module, expert: int, neurons: slice) -> Tensor:
    """Gate and up weights of a contiguous run of c neurons: ``[2c, H]``, laid out for ``_apply_gate``."""
    weight: Tensor = module.gate_up_proj[expert]  # type: ignore[index]
    rows = weight.t() if module.is_transposed else weight
    return _both(module, rows, neurons)


def gate_up_bias(module: nn.Module, expert: int, neurons: slice) -> Tensor | None:
    """Bias of the same rows, ``[2c]``, or None."""
    if not module.has_bias:
        return None
    bias: Tensor = module.gate_up_proj_bias[expert]  # type: ignore[index]
    return _both(module, bias, neurons)


def down(module: nn.Module, expert: int, neurons: slice) -> Tensor:
    """Down weights of a contiguous run of c neurons: ``[c, H]``, one row a neuron."""
    weight: Tensor = module.down_proj[expert]  # type: ignore[index]
    return weight[neurons] if module.is_transposed else weight.t()[neurons]


def down_bias(module: nn.Module) -> Tensor | None:
    """Output biases ``[E, H]``, or None. They belong to the expert, not to any neuron."""
    return module.down_proj_bias if module.has_bias else None  # type: ignore[return-value]


def activations(module: nn.Module, expert: int, x: Tensor, neurons: slice = slice(None)) -> Tensor:
    """Intermediate activations ``act(x W_gate) * (x W_up)`` (arXiv 2510.19366, phase 1.1).

    Args:
        module: the stacked experts.
        expert: which one.
        x: ``[T, H]`` in the dtype of the weights.
        neurons: a contiguous run; all by default.

    Returns:
        ``[T, c]``.
    """
    projected = torch.nn.functional.linear(x, gate_up(module, expert, neurons), gate_up_bias(module, expert, neurons))
    applied: Tensor = module._apply_gate(projected)  # type: ignore[operator]
    return applied


def leading_activations(module: nn.Module, expert: int, x: Tensor, runs: int, r: int) -> Tensor:
    """Activations of the first r neurons of each of ``runs`` equal runs, by one matrix product.

    Args:
        module: the stacked experts.
        expert: which one.
        x: ``[T, H]``.
        runs: equal runs that an expert's neurons fall into.
        r: neurons of each.

    Returns:
        ``[T, runs, r]``.
    """
    weight = _leading_rows(module, gate_up(module, expert, slice(None)), runs, r)
    bias = gate_up_bias(module, expert, slice(None))
    projected = torch.nn.functional.linear(x, weight, None if bias is None else _leading_rows(module, bias, runs, r))
    applied: Tensor = module._apply_gate(projected)  # type: ignore[operator]
    return applied.view(len(x), runs, r)


def _leading_rows(module: nn.Module, rows: Tensor, runs: int, r: int) -> Tensor:
    if module.is_concatenated:
        return rows.reshape(2, runs, -1, *rows.shape[1:])[:, :, :r].flatten(0, 2)
    return rows.reshape(runs, -1, 2, *rows.shape[1:])[:, :r].flatten(0, 2)


def _both(module: nn.Module, rows: Tensor, neurons: slice) -> Tensor:
    count = rows.shape[0] // 2
    start, stop, _ = neurons.indices(count)
    if not module.is_concatenated:  # gate0, up0, gate1, up1, ...
        return rows[2 * start : 2 * stop]
    if (start, stop) == (0, count):
        return rows
    return torch.cat([rows[start:stop], rows[count + start : count + stop]])


_PLAIN: dict[tuple[type, type, bool], bool] = {}


def is_plain(module: nn.Module) -> bool:
    """Whether the layer is ``silu(gate) * up`` without biases, in the usual layout; found out once."""
    key = (type(module), type(getattr(module, "act_fn", None)), bool(module.has_bias))
    if key not in _PLAIN:
        probe = torch.linspace(-9, 9, 8).view(1, 8)
        gate, up = probe.chunk(2, dim=1)
        applied: Tensor = module._apply_gate(probe)  # type: ignore[operator]
        usual = applied.shape == gate.shape and torch.allclose(applied, torch.nn.functional.silu(gate) * up)
        _PLAIN[key] = bool(module.is_concatenated) and not module.has_bias and usual
    return _PLAIN[key]

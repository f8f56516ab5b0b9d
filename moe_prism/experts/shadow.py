"""A copy of expert weights in 8 bits whose upper 4 bits can be read alone.

Every row is cut into groups of 32 with one scale each. A weight is an 8-bit code, written as 16 times an upper digit
plus a lower one, both from -8 to 7. The digits lie in two planes, so that a reader of the upper plane alone has the
weight rounded to 4 bits, to nearest and with an exact zero, and reading the lower plane later makes it 8. Knows nothing
of which rows are read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import PrismError
from .neurons import down, gate_up

GROUP = 32
# Of a bfloat16 weight's bytes: the upper plane with its 16-bit scales, and the lower plane.
UPPER_SHARE = (4 + 16 / GROUP) / 16
LOWER_SHARE = 4 / 16


class Planes(NamedTuple):
    """Rows of ``H`` weights.

    Attributes:
        upper: uint8 ``[..., H / 2]``, upper digits with 8 added, two a byte: elements 0..15 of a group in the lower
            halves of bytes, 16..31 in the upper halves.
        lower: uint8 ``[..., H / 2]``, lower digits, packed the same way.
        scale: bf16 ``[..., H / 32]``; a weight is code times scale, a code is from -128 to 119.
    """

    upper: Tensor
    lower: Tensor
    scale: Tensor


class Shadow(NamedTuple):
    """The copy of one layer's experts, plain layouts only (``is_plain``).

    Attributes:
        gate_up: rows ``[E, 2C, H]``: C of gate, then C of up.
        down: rows ``[E, C, H]``, one a neuron.
        norms: fp32 ``[E, C]``, norm of every neuron's down row.
    """

    gate_up: Planes
    down: Planes
    norms: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Under the names of the checkpoint."""
        planes = {"gate_up": self.gate_up, "down": self.down}
        named = {f"shadow.{name}.{part}": getattr(p, part) for name, p in planes.items() for part in Planes._fields}
        return named | {"shadow.norms": self.norms}

    @staticmethod
    def take(tensors: dict[str, Tensor]) -> Shadow | None:
        """Take the tensors of a shadow out of a layer's; None where it has none.

        Raises:
            KeyError: some of them are missing.
        """
        if "shadow.norms" not in tensors:
            return None
        gate_up, down = (
            Planes(*(tensors.pop(f"shadow.{name}.{part}") for part in Planes._fields)) for name in ("gate_up", "down")
        )
        return Shadow(gate_up, down, tensors.pop("shadow.norms"))


def to_planes(rows: Tensor) -> Planes:
    """Round rows to 8 bits, to nearest, and split the codes.

    Args:
        rows: ``[..., H]``, any floating-point dtype.

    Raises:
        PrismError: H is not a multiple of 32.
    """
    if rows.shape[-1] % GROUP:
        raise PrismError(
            f"a shadow needs rows whose length is a multiple of {GROUP}, got a hidden size of {rows.shape[-1]}; "
            "set shadow_bits: 0"
        )
    groups = rows.float().unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1) / 119).clamp(min=1e-12).bfloat16()
    codes = (groups / scale.float()[..., None]).round().clamp(-128, 119).to(torch.int16) + 136
    return Planes(_pack(codes >> 4), _pack(codes & 15), scale)  # 136 = 16 * 8 + 8: both digits have 8 added


def from_planes(planes: Planes, bits: int) -> Tensor:
    """The weights as read at 4 or 8 bits: fp32 ``[..., H]``."""
    codes = 16 * (_unpack(planes.upper) - 8)
    if bits == 8:
        codes += _unpack(planes.lower) - 8
    return (codes * planes.scale.float()[..., None]).flatten(-2)


def make_shadow(module: nn.Module) -> Shadow:
    """The shadow of stacked experts; raises PrismError where the hidden size does not allow one."""
    experts = range(int(module.num_experts))  # type: ignore[arg-type]
    both = [gate_up(module, e, slice(None)).detach() for e in experts]
    downs = [down(module, e, slice(None)).detach() for e in experts]
    norms = torch.stack([rows.float().norm(dim=1) for rows in downs]).cpu()
    return Shadow(_stack([to_planes(rows) for rows in both]), _stack([to_planes(rows) for rows in downs]), norms)


def _stack(planes: list[Planes]) -> Planes:
    return Planes(*(torch.stack(parts).cpu() for parts in zip(*planes, strict=True)))


def _pack(nibbles: Tensor) -> Tensor:
    """``[..., G, 32]`` values 0..15 as bytes ``[..., 16 G]``."""
    first, second = nibbles.to(torch.uint8).chunk(2, dim=-1)
    return (first | (second << 4)).flatten(-2)


def _unpack(packed: Tensor) -> Tensor:
    """Undo ``_pack``: fp32 ``[..., G, 32]``."""
    groups = packed.unflatten(-1, (-1, GROUP // 2))
    return torch.cat([groups & 15, groups >> 4], dim=-1).float()

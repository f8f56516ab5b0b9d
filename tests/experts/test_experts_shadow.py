"""The 8-bit copy and its upper plane, against codes worked out one by one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_model

from moe_prism.errors import PrismError
from moe_prism.experts import find_expert_layers
from moe_prism.experts.neurons import down, gate_up
from moe_prism.experts.shadow import (
    LOWER_SHARE,
    UPPER_SHARE,
    Planes,
    Shadow,
    from_planes,
    make_shadow,
    to_planes,
)


def test_planes_hold_the_digits_of_the_codes() -> None:
    torch.manual_seed(0)
    rows = torch.randn(2, 96)
    planes = to_planes(rows)
    at_4, at_8 = from_planes(planes, 4), from_planes(planes, 8)
    for r in range(2):
        for c in range(96):
            scale = planes.scale[r, c // 32].item()
            code = max(-128, min(119, round(rows[r, c].item() / scale)))
            assert at_8[r, c].item() == pytest.approx(code * scale, rel=1e-6)
            assert at_4[r, c].item() == pytest.approx(16 * math.floor(code / 16 + 0.5) * scale, rel=1e-6)


@given(st.integers(0, 1000), st.sampled_from([1e-4, 1.0, 1e4]))
def test_rounding_stays_within_half_a_step(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 64, generator=generator) * size
    planes = to_planes(rows)
    step = planes.scale.float().repeat_interleave(32, dim=1)
    assert ((from_planes(planes, 8) - rows).abs() <= step * 1.01).all()  # a bf16 scale may cut the largest by 0.5
    assert ((from_planes(planes, 4) - rows).abs() <= step * 8.6).all()


def test_the_shares_are_the_bytes_of_the_planes() -> None:
    planes = to_planes(torch.randn(5, 128))
    stored = 5 * 128 * 2
    assert planes.upper.nbytes + planes.scale.nbytes == UPPER_SHARE * stored
    assert planes.lower.nbytes == LOWER_SHARE * stored


def test_zeros_and_a_lone_large_weight() -> None:
    rows = torch.zeros(1, 64)
    rows[0, 40] = -3.0
    found = from_planes(to_planes(rows), 8)
    assert not found[0, :32].any()
    assert found[0, 40] == pytest.approx(-3, rel=1e-2)


def test_the_shadow_of_a_layer_survives_its_names() -> None:
    module = find_expert_layers(tiny_model("olmoe"))[0].module
    shadow = make_shadow(module)
    for e in range(int(module.num_experts)):
        step = shadow.gate_up.scale[e].float().repeat_interleave(32, dim=1)
        read = from_planes(Planes(*(plane[e] for plane in shadow.gate_up)), 8)
        assert ((read - gate_up(module, e, slice(None))).abs() <= step * 1.01).all()
        torch.testing.assert_close(shadow.norms[e], down(module, e, slice(None)).norm(dim=1))
    named = shadow.tensors() | {"other": torch.zeros(1)}
    again = Shadow.take(named)
    assert list(named) == ["other"]
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(again.gate_up + again.down, shadow.gate_up + shadow.down, strict=True))
    assert Shadow.take(named) is None
    with pytest.raises(KeyError):
        Shadow.take({"shadow.norms": shadow.norms})


def test_rows_that_do_not_fit_groups_are_refused() -> None:
    with pytest.raises(PrismError, match="multiple of 32, got a hidden size of 40"):
        to_planes(torch.zeros(2, 40))

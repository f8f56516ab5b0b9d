"""The compiled attention of decode steps against torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from moe_prism.engine.decode import attend


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "group", "size", "value_size"), [(2, 1, 48, 48), (1, 4, 20, 7), (3, 2, 16, 32)])
def test_against_torch(
    heads: int, group: int, size: int, value_size: int, dtype: torch.dtype, threads: int, request: pytest.FixtureRequest
) -> None:
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    start, length = np.array([10, 0, 40, 3]), np.array([7, 1, 20, 4])
    keys, values = torch.randn(heads, 64, size).to(dtype), torch.randn(heads, 64, value_size).to(dtype)
    query = (3 * torch.randn(4, heads * group, size)).to(dtype)
    got = attend(query, keys, values, start, length, 0.3)
    for row, (first, count) in enumerate(zip(start, length, strict=True)):
        mine = slice(int(first), int(first + count))
        k, v = keys[None, :, mine].float(), values[None, :, mine].float()
        expected = scaled_dot_product_attention(query[None, row, :, None].float(), k, v, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(
            got[row].float(), expected[0, :, 0], atol=1e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2
        )

"""Pieces of the compiled kernels against NumPy and torch."""

import numba
import numpy as np
import pytest
import torch

from moe_prism.elastic.kernels import gated_blocks, gated_pairs
from moe_prism.elastic.kernels.compiled import narrow
from moe_prism.elastic.kernels.dots import has_products_of_pairs
from moe_prism.elastic.kernels.neuron_pairs import neuron_pairs
from moe_prism.elastic.kernels.neurons import by_value, keep_best
from moe_prism.elastic.kernels.silu import silu
from moe_prism.elastic.kernels.streams import add_4_rows, dot_4_rows


@numba.njit
def dots(rows, at, ahead, v):
    return dot_4_rows(rows, (at[0], at[1], at[2], at[3]), (ahead[0], ahead[1], ahead[2], ahead[3]), v)


@numba.njit
def sums(y, w, rows, at, ahead):
    add_4_rows(
        y, (w[0], w[1], w[2], w[3]), rows, (at[0], at[1], at[2], at[3]), (ahead[0], ahead[1], ahead[2], ahead[3])
    )


@numba.njit
def narrowed(values, like):
    out = np.empty(values.shape, like.dtype)
    for i in range(values.shape[0]):
        out[i] = narrow(values[i], like[0])
    return out


def weights(hidden, bfloat16, seed=0):
    """Rows as a kernel takes them, and their values."""
    values = torch.randn(9, hidden, generator=torch.Generator().manual_seed(seed))
    if bfloat16:
        values = values.bfloat16()
        return values.view(torch.int16).numpy().view(np.uint16), values.double().numpy()
    return values.numpy(), values.double().numpy()


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("hidden", [1, 15, 16, 17, 64, 83])
def test_four_rows_in_any_order_with_rows_ahead_that_need_not_exist(hidden, bfloat16):
    rows, values = weights(hidden, bfloat16)
    v = np.random.default_rng(1).normal(size=hidden).astype(np.float32)
    for at, ahead in (([0, 1, 2, 3], [4, 5, 6, 7]), ([8, 2, 2, 5], [9, 10, 1 << 40, -1])):
        at, ahead = np.array(at), np.array(ahead)
        assert np.allclose(dots(rows, at, ahead, v), values[at] @ v.astype(np.float64), rtol=1e-5, atol=1e-5)
        w = np.array([0.5, -2, 3, 0.1], np.float32)
        y = v.copy()
        sums(y, w, rows, at, ahead)
        assert np.allclose(y, v + w.astype(np.float64) @ values[at], rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_pass_through_the_sums():
    rows, _ = weights(40, False)
    rows = rows.copy()
    rows[1, 39], rows[2, 3] = np.nan, np.inf
    v = np.ones(40, np.float32)
    found = dots(rows, np.arange(4), np.arange(4), v)
    assert np.array_equal(np.isnan(found), [False, True, False, False])
    assert np.array_equal(np.isposinf(found), [False, False, True, False])


def test_bfloat16_is_rounded_as_torch_rounds_it():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(1 << 31), (1 << 31) - 1, (200_000,), generator=generator, dtype=torch.int64).int()
    halves = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) * 65536  # every bfloat16, and ties between them
    values = torch.cat([bits, halves, halves + 0x8000, halves + 0x7FFF, halves + 0x8001]).view(torch.float32)
    ours = narrowed(values.numpy(), np.zeros(1, np.uint16))
    theirs = values.bfloat16()
    number = ~theirs.isnan()
    found = torch.from_numpy(ours.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(found[number], theirs[number])
    assert bool(found[~number].isnan().all())
    assert np.array_equal(
        narrowed(values.numpy(), np.zeros(1, np.float32)).view(np.int32), values.numpy().view(np.int32)
    )


@pytest.mark.parametrize("size", [6, 70])
def test_a_block_gives_the_same_bits_in_any_company_and_on_any_number_of_threads(size):
    generator = torch.Generator().manual_seed(0)
    blocks, hidden = 3, 48
    rows = torch.randn(blocks * 3 * size, hidden, generator=generator).bfloat16()
    bits = rows.view(torch.int16).numpy().view(np.uint16)
    x = torch.randn(2, hidden, generator=generator)
    token, weight = np.array([0, 0, 1, 1]), np.array([0.5, 1.5, -1.0, 2.0], np.float32)  # pairs of blocks 0, 1, 1, 2
    mine = rows.double().view(blocks, 3, size, hidden)[[0, 1, 1, 2]]
    inputs = x.double()[token]
    hidden_values = torch.nn.functional.silu(torch.einsum("sch,sh->sc", mine[:, 0], inputs))
    hidden_values *= torch.einsum("sch,sh->sc", mine[:, 1], inputs)
    expected = torch.einsum("sc,sch->sh", hidden_values * torch.from_numpy(weight)[:, None], mine[:, 2])
    found = []
    companies = [[[0, 1, 2, 3]], [[3], [1, 2], [0]], [[1, 2, 0], [3]]]
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        for company in companies:
            out = np.zeros((4, hidden), np.float32)
            for pairs in company:
                block = np.array([0, 1, 1, 2])[pairs]
                begins = [i for i in range(len(pairs)) if i == 0 or block[i] != block[i - 1]]
                starts, first = np.array([*begins, len(pairs)]), block[begins] * 3 * size
                gated_blocks(bits, x.numpy(), token, weight, np.array(pairs), starts, first, size, out)
            found.append(out)
        torch.set_num_threads(before)
    assert np.allclose(found[0], expected, rtol=1e-4, atol=1e-3)
    assert all(np.array_equal(other, found[0]) for other in found)


VALUES = {
    "different": lambda rng, shape: rng.standard_normal(shape),
    "equal": lambda rng, shape: rng.integers(-1, 2, shape),
    "zeros of both signs": lambda rng, shape: np.where(rng.random(shape) < 0.5, -0.0, 0.0),
    "infinite": lambda rng, shape: np.where(rng.random(shape) < 0.3, np.inf, rng.standard_normal(shape)),
    "close": lambda rng, shape: 1 + rng.random(shape) * 1e-4,
}


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_the_best_are_kept_and_the_first_among_equals(kind, threshold):
    rng = np.random.default_rng(0)
    for _ in range(40):
        pairs, size = rng.integers(1, 7), rng.integers(1, 20)
        score = VALUES[kind](rng, (pairs, size)).astype(np.float32)
        token, count = rng.integers(0, 3, pairs), rng.integers(0, pairs * size + 3, 3)
        expected = []
        for t in np.unique(token):
            mine = [(s, c) for s in range(pairs) if token[s] == t for c in range(size)]
            if count[t]:
                best = sorted(range(len(mine)), key=lambda i: -score[mine[i]])[: count[t]]
                expected += [mine[i] for i in sorted(best)]
            else:
                expected += [at for at in mine if score[at] > threshold]
        assert list(zip(*map(list, keep_best(score, token, count, threshold)), strict=True)) == expected


needs_pairs = pytest.mark.skipif(
    not has_products_of_pairs(), reason="this CPU has no products of bfloat16 pairs (AVX512-BF16)"
)
COUNTS = [0, 1, 2, 3, 4, 5, 8, 11, 0, 7]  # tokens of every sub-expert


class Layer:
    """Two sub-experts of each of five experts, which tokens run them, and every neuron's part of the output."""

    def __init__(self, hidden, size):
        rng = np.random.default_rng(hidden + size)
        self.n, self.size, experts, tokens = 2, size, 5, 11
        self.gate_up, up_values = bits(rng.normal(size=(experts * 2 * self.n * size, hidden)) / hidden**0.5)
        self.down, down_values = bits(rng.normal(size=(experts * self.n * size, hidden)) / size**0.5)
        self.x, x_values = bits(rng.normal(size=(tokens, hidden)))
        self.sub_expert = np.repeat(np.arange(self.n * experts), COUNTS)
        self.token = np.concatenate([np.sort(rng.choice(tokens, count, replace=False)) for count in COUNTS])
        self.weight = rng.random(len(self.token)).astype(np.float32)
        self.gates, self.outputs = [], []  # of every pair: weight * silu(gate) [size], and [size, H]
        for s, t, w in zip(self.sub_expert, self.token, self.weight, strict=True):
            of_gate = s // self.n * 2 * self.n * size + s % self.n * size
            gate = up_values[of_gate : of_gate + size] @ x_values[t]
            up = up_values[of_gate + self.n * size : of_gate + self.n * size + size] @ x_values[t]
            self.gates.append(w * gate / (1 + np.exp(-gate)))
            self.outputs.append((self.gates[-1] * up)[:, None] * down_values[s * size : (s + 1) * size])

    def expected(self, kept=None):
        """float64 ``[T, H]`` of all neurons, or of those that are kept by (pair, neuron)."""
        out = np.zeros(self.x.shape)
        for pair, t in enumerate(self.token):
            out[t] += (self.outputs[pair] if kept is None else self.outputs[pair] * kept[pair][:, None]).sum(axis=0)
        return out

    def run(self, kernel, *rest, threads=1):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            given = self.gate_up, self.down, self.x, self.token, self.sub_expert, self.weight
            out = kernel(*given, *rest, self.n * self.size, self.n)
        finally:
            torch.set_num_threads(before)
        return torch.from_numpy(out.view(np.int16)).view(torch.bfloat16).double().numpy()


SIZES = [(64, 4), (128, 12), (192, 64), (64, 68), (128, 132)]


@needs_pairs
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("hidden", "size"), SIZES)
def test_products_of_pairs_are_the_weighted_sum_of_sub_experts(hidden, size, threads):
    layer = Layer(hidden, size)
    expected = layer.expected()
    found = layer.run(gated_pairs.gated_pairs, threads=threads)
    assert np.abs(found - expected).max() < 0.01 * np.abs(expected).max()


@needs_pairs
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
@pytest.mark.parametrize(("hidden", "size"), SIZES)
def test_products_of_pairs_of_the_kept_neurons(hidden, size, threshold, threads):
    layer = Layer(hidden, size)
    rng = np.random.default_rng(0)
    scale = rng.random((10, size)).astype(np.float32)
    score = np.array([abs(gate) * scale[s] for gate, s in zip(layer.gates, layer.sub_expert, strict=True)])
    count = np.zeros(11, np.int64) if threshold else rng.integers(1, 3 * size, 11)
    kept = score > threshold
    for t in range(0 if threshold else 11):
        mine = np.flatnonzero(layer.token == t)
        order = np.sort(score[mine].ravel())[::-1]
        kept[mine] = score[mine] >= order[min(count[t], len(order)) - 1]
    expected = layer.expected(kept)
    found = layer.run(neuron_pairs, scale, count, threshold, threads=threads)
    assert 0 < kept.sum() < kept.size
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@needs_pairs
@pytest.mark.parametrize("count", range(13))
def test_products_of_pairs_keep_the_first_among_equals(count):
    """Three sub-experts of four equal gates each: a token keeps neurons in their order, whatever it runs beside."""
    hidden, size = 64, 4
    gate_up, _ = bits(np.ones((2 * 3 * size, hidden)) / 8)
    down, values = bits(np.random.default_rng(0).normal(size=(3 * size, hidden)))
    x, _ = bits(np.ones((1, hidden)))
    out = neuron_pairs(
        gate_up, down, x, np.zeros(3, np.int64), np.arange(3), np.ones(3, np.float32), np.ones((3, size), np.float32),
        np.array([count]), 1e9 if not count else 0.0, 3 * size, 3,
    )  # fmt: skip
    gate = 8.0
    expected = gate / (1 + np.exp(-gate)) * gate * values[:count].sum(axis=0)
    found = torch.from_numpy(out.view(np.int16)).view(torch.bfloat16).double().numpy()[0]
    assert np.allclose(found, expected, rtol=0.01, atol=0.5)


@needs_pairs
@pytest.mark.parametrize("some", [False, True])
def test_products_of_pairs_let_nan_and_infinity_through_to_their_token_only(some):
    rng = np.random.default_rng(0)
    gate_up, _ = bits(rng.normal(size=(2 * 8, 64)))
    down, _ = bits(rng.normal(size=(8, 64)))
    values = rng.normal(size=(5, 64))
    values[1, 3], values[3, 60] = np.nan, np.inf
    x, _ = bits(values)
    given = gate_up, down, x, np.arange(5), np.zeros(5, np.int64), np.ones(5, np.float32)
    if some:
        out = neuron_pairs(*given, np.ones((1, 8), np.float32), np.full(5, 6), 0.0, 8, 1)
    else:
        out = gated_pairs.gated_pairs(*given, 8, 1)
    finite = torch.from_numpy(out.view(np.int16)).view(torch.bfloat16).isfinite().all(dim=1)
    assert finite.tolist() == [True, False, True, False, True]


@numba.njit
def silus(values):
    out = np.empty_like(values)
    for i in range(values.shape[0]):
        out[i] = silu(values[i])
    return out


def test_silu_is_that_of_torch():
    rng = np.random.default_rng(0)
    values = np.concatenate([np.linspace(-100, 100, 100_001), rng.normal(size=10_000), [0, 1e-30, -1e30, 1e30]])
    values = values.astype(np.float32)
    exact = torch.nn.functional.silu(torch.from_numpy(values).double()).numpy()
    assert (np.abs(silus(values) - exact) <= 4e-7 * np.abs(exact) + 1e-36).all()
    odd = np.array([np.nan, np.inf, -np.inf], np.float32)
    assert np.array_equal(silus(odd), torch.nn.functional.silu(torch.from_numpy(odd)).numpy(), equal_nan=True)


def test_places_by_value_are_a_stable_order():
    values = np.random.default_rng(0).integers(0, 7, 50)
    order, first = by_value(values, 9)
    assert np.array_equal(order, np.argsort(values, kind="stable"))
    assert first.tolist() == [int((values < v).sum()) for v in range(10)]


def bits(values):
    """Values rounded to bfloat16, as a kernel takes them and as what they are."""
    rounded = torch.from_numpy(values).bfloat16().contiguous()
    return rounded.view(torch.int16).numpy().view(np.uint16), rounded.double().numpy()

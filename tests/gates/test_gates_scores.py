from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, tiny_model

from moe_prism.errors import PrismError
from moe_prism.experts import find_expert_layers
from moe_prism.experts.neurons import activations, gate_up, gate_up_bias
from moe_prism.gates import GATES, ExpertProfile, LayerShape
from moe_prism.gates.probe import ProbeGate
from moe_prism.gates.proxy import ProxyGate


def profile(tokens: int = 50, neurons: int = 16, seed: int = 0) -> ExpertProfile:
    generator = torch.Generator().manual_seed(seed)
    return ExpertProfile(
        torch.randn(tokens, neurons, generator=generator),
        torch.rand(tokens, generator=generator),
        torch.rand(neurons, generator=generator) + 0.1,
        torch.randn(8, generator=generator),
    )


def test_proxy_picks_the_most_central_neurons_of_each_sub_expert() -> None:
    """Against the definition, written with loops: co-activation counts inside the sub-expert."""
    p = profile()
    gate = ProxyGate(gate_neurons=2, active_share=0.75)
    found = gate.leading(p, 4)
    magnitude = p.activations.abs()
    active = torch.zeros(50, 16)
    for b in range(50):
        for c in sorted(range(16), key=lambda c: -magnitude[b, c].item())[:12]:
            active[b, c] = 1
    for n in range(4):
        own = range(4 * n, 4 * n + 4)
        centrality = {c: sum(int(active[b, c]) * int(active[b, d]) for b in range(50) for d in own) for c in own}
        best = sorted(centrality.values(), reverse=True)[:2]
        assert [centrality[int(c)] for c in found[n]] == best


@pytest.mark.parametrize("family", FAMILIES)
def test_proxy_scores_are_mean_activations_and_are_handed_on(family: str) -> None:
    layer = find_expert_layers(tiny_model(family))[0]
    x = torch.randn(6, layer.hidden_size)
    index = torch.stack([torch.randperm(layer.num_experts)[: layer.top_k] for _ in range(6)])
    with torch.no_grad():
        scores = ProxyGate(gate_neurons=2).score(layer.module, {}, x, index, 4)
        size = layer.num_neurons // 4
        for t in range(6):
            for slot in range(layer.top_k):
                full = activations(layer.module, int(index[t, slot]), x[t : t + 1])[0]
                for n in range(4):
                    mine = full[n * size : n * size + 2]
                    torch.testing.assert_close(scores.activations[t, slot, n], mine, atol=1e-5, rtol=1e-5)
                    torch.testing.assert_close(scores.values[t, slot, n], mine.abs().mean(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_probe_scores_by_the_largest_coordinates(family: str, share: float) -> None:
    """Neuron by neuron with the other coordinates cut out of x and of the rows."""
    torch.manual_seed(0)
    layer = find_expert_layers(tiny_model(family))[0]
    norms = torch.rand(layer.num_experts, layer.num_neurons)
    x = torch.randn(5, layer.hidden_size)
    index = torch.stack([torch.randperm(layer.num_experts)[: layer.top_k] for _ in range(5)])
    gate = ProbeGate(share=share)
    with torch.no_grad():
        values = gate.score(layer.module, {"down_norms": norms}, x, index, 4).values
        for t in range(5):
            seen = sorted(range(layer.hidden_size), key=lambda i: -abs(x[t, i].item()))[: int(share * 32)]
            for slot, expert in enumerate(index[t].tolist()):
                rows, bias = gate_up(layer.module, expert, slice(None)), gate_up_bias(layer.module, expert, slice(None))
                projected = rows[:, seen] @ x[t, seen] + (0 if bias is None else bias)
                bound = layer.module._apply_gate(projected[None])[0].abs() * norms[expert]
                torch.testing.assert_close(values[t, slot], bound.view(4, -1).sum(1), atol=1e-4, rtol=1e-4)
    assert gate.fit(profile(), 4)["down_norms"].equal(profile().down_norms)


def test_linear_scores_equal_the_router_between_experts_and_tie_inside() -> None:
    layer = find_expert_layers(tiny_model("olmoe"))[0]
    gate = GATES.create("linear")
    rows = layer.router.weight.detach()
    tensors = {"rows": torch.stack([gate.fit(profile()._replace(router_row=r), 4)["rows"] for r in rows])}
    x = torch.randn(7, layer.hidden_size)
    with torch.no_grad():
        _, weight, index = layer.router(x)
        values = gate.score(layer.module, tensors, x, index, 4).values
    assert torch.equal(values, values[..., :1].expand_as(values))
    ratio = values[..., 0] / values[..., :1, 0]
    torch.testing.assert_close(ratio, weight / weight[:, :1], atol=1e-4, rtol=1e-4)


def test_static_scores_are_mean_output_bounds() -> None:
    p = profile()
    gate = GATES.create("static")
    importance = gate.fit(p, 4)["importance"]
    expected = (p.activations.abs().mean(0) * p.down_norms).view(4, 4).sum(1)
    torch.testing.assert_close(importance, expected)
    table = torch.stack([importance, 2 * importance])
    scores = gate.score(torch.nn.Identity(), {"importance": table}, torch.zeros(1, 8), torch.tensor([[1, 0]]), 4)
    torch.testing.assert_close(scores.values[0, 0], 2 * importance)


def test_costs_by_hand() -> None:
    shape = LayerShape(num_experts=64, num_neurons=1024, hidden_size=2048, top_k=8, num_sub_experts=4)
    assert GATES.create("static").cost(shape, 9) == (0, 0)
    # 23 idle candidates, 4 gate neurons each, a gate and an up row of 2048
    assert GATES.create("proxy").cost(shape, 9).weights == 23 * 4 * 2 * 2048
    assert GATES.create("proxy").cost(shape, 32).flops == 0
    assert GATES.create("linear").cost(shape, 9).flops == 2 * 256 * 2048
    # a quarter of every gate and up row of 8 experts of 1024 neurons
    assert GATES.create("probe", {"share": 0.25}).cost(shape, 9) == (2 * 8 * 1024 * 2 * 512, 8 * 1024 * 2 * 512)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("proxi", {}, "unknown gate 'proxi'; known: linear, probe, proxy, static"),
        ("proxy", {"r": 4}, "no option 'r'; it has: active_share, gate_neurons, weighted"),
        ("proxy", {"gate_neurons": 0}, "at least 1, got 0"),
        ("proxy", {"active_share": 1.5}, r"\(0, 1\], got 1.5"),
        ("probe", {"share": 0}, r"\(0, 1\], got 0"),
    ],
)
def test_bad_gates_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(PrismError, match=message):
        GATES.create(name, options)


def test_more_gate_neurons_than_a_sub_expert_has() -> None:
    with pytest.raises(PrismError, match="at most the 4 neurons of a sub-expert, got 5"):
        ProxyGate(gate_neurons=5).leading(profile(), 4)

"""Run one MoE layer at a budget: the function that transformers calls for every stacked experts module.

Scores -> selection -> executor. At full budget there is no gate work: the model's own path runs, or on a
CPU the fast executor over whole experts. Knows nothing of checkpoints: a layer's state is attached by
``elastic.model``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.integrations.moe import grouped_mm_experts_forward

from .._on_import import IMPLEMENTATION
from ..errors import PrismError
from ..experts.neurons import down_bias
from ..experts.shadow import Shadow
from ..gates import Gate
from .batch_selection import choose
from .compensation import Recalibration
from .cpu_selection import best_candidates, gather_candidates, select, select_all
from .dial import Dial, Limiter, StepBudgets
from .executors import NeuronRule, choose_executor
from .executors.choice import What
from .folding import folded
from .ladder import LadderPlan, run_ladder
from .selection import (
    Selection,
    gather_selection,
    pooled_scores,
    softmax_weights,
    whole_experts,
)

# Tokens at full budget from which they run apart from the others of a step on a CPU: scoring a long prompt for nothing
# costs more than reading some weights twice (256 of 260 tokens, bundled model: 29 ms a layer together, 13 apart).
SPLIT_FROM = 64


@dataclass
class ElasticLayer:
    """What a stacked experts module needs beside its weights.

    Attributes:
        name: module path, for messages.
        dial: shared by all layers of the model.
        gate: scores the sub-experts.
        tensors: the gate's, each ``[E, ...]``.
        num_sub_experts: N.
        neuron_scale: fp32 ``[E, C]`` of ``NeuronRule``, where the plan skips neurons.
        compensation: what is done to the output below full budget, if anything.
        shadow: the experts at few bits, where the plan is a ladder.
        number: of the layer among those of the model.
        thresholds: fp32 ``[full + 1]`` of ``Sharing``, where tokens share budgets.
        fold: fp32 ``[E, N + 1]`` of ``folding``, where weights are scaled for what does not run.
    """

    name: str
    dial: Dial
    gate: Gate
    tensors: dict[str, Tensor]
    num_sub_experts: int
    neuron_scale: Tensor | None = None
    compensation: Recalibration | None = None
    shadow: Shadow | None = None
    number: int = 0
    thresholds: Tensor | None = None
    fold: Tensor | None = None
    _placed: dict[torch.device, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def on(self, device: torch.device) -> dict[str, Tensor]:
        """The gate's tensors on a device, moved there once."""
        if device not in self._placed:
            self._placed[device] = {name: value.to(device) for name, value in self.tensors.items()}
        return self._placed[device]

    def replace(self, name: str, value: Tensor) -> None:
        """Use another value of one of the gate's tensors from now on."""
        self.tensors[name] = value
        self._placed.clear()


def state_of(module: nn.Module) -> ElasticLayer | None:
    """The state attached to a stacked experts module, if any."""
    return module.__dict__.get("_moe_prism")


def elastic_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The registered experts function.

    Args:
        module: the stacked experts.
        hidden_states: ``[T, H]``.
        top_k_index: int64 ``[T, k]``; the value E marks a slot without an expert on this device.
        top_k_weights: ``[T, k]``.

    Returns:
        ``[T, H]``.
    """
    state = state_of(module)
    if state is None:
        from .model import attach_on_demand

        state = attach_on_demand(module)
    tokens, device = hidden_states.shape[0], hidden_states.device
    step = state.dial.step(tokens, device, state.number)
    many = tokens > SPLIT_FROM and device.type == "cpu"
    if many and step is not None and step.k_min is step.means is None:
        whole = step.k_active == state.dial.full_budget
        count = int(whole.sum())
        if SPLIT_FROM <= count < len(whole):
            out = torch.empty_like(hidden_states)
            for rows, budgets in ((whole, None), (~whole, StepBudgets(step.k_active[~whole]))):
                out[rows] = run_budgets(
                    state, module, hidden_states[rows], top_k_index[rows], top_k_weights[rows], budgets
                )
            return out
    return run_budgets(state, module, hidden_states, top_k_index, top_k_weights, step)


def run_budgets(
    state: ElasticLayer,
    module: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    step: StepBudgets | None,
) -> Tensor:
    """The experts of tokens at the budgets of a step, or at full budget where it is None; as ``elastic_experts``."""
    n, experts = state.num_sub_experts, int(module.num_experts)  # type: ignore[arg-type]
    index, valid = top_k_index, None
    if module._is_expert_parallel:
        if state.gate.reweights:
            raise PrismError(f"{state.name}: a gate that gives weights needs all experts of a token on one device")
        valid = top_k_index < experts
        index = top_k_index.clamp(max=experts - 1)
    scores, limiter = None, state.dial.limiter
    if limiter is not None and not limiter.limits(len(index)):
        limiter = None
    if step is None and limiter is not None:
        step = StepBudgets(torch.full((len(index),), state.dial.full_budget))
    if step is not None:
        scores = state.gate.score(module, state.on(hidden_states.device), hidden_states, index, n)
        if step.means is not None:
            step = _share(state, step, scores.values, top_k_weights, valid)
    look, neurons = (step, None) if step is None else state.dial.spend(step)
    runs: float = index.numel()
    if step is not None and hidden_states.device.type == "cpu":  # elsewhere it decides nothing
        runs = (int(step.k_active.sum()) if step.pairs is None else step.pairs) / n
    what: What = "experts" if step is None else "parts" if neurons is None else "neurons"
    plan = state.dial.plan
    block = 1 if plan is None else plan.block
    executor = choose_executor(state.dial.executor, module, hidden_states, runs, what, n, block)
    if step is None and not executor.runs_full:
        own: Tensor = grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
        return own
    plain = valid is None and hidden_states.device.type == "cpu"
    if step is None or look is None or scores is None:
        everything = select_all(top_k_weights.detach(), index) if plain else whole_experts(index, top_k_weights, valid)
        out = executor.run(module, hidden_states, everything, 1)
    else:
        weighted = state.gate.weighted
        if limiter is not None:
            selection, step = _limited(state, limiter, scores.values, top_k_weights, index, look, step)
        elif look.k_min is None and plain:
            selection = select(scores.values.detach(), top_k_weights.detach(), index, look.k_active, weighted)
        else:
            pooled = pooled_scores(scores.values, top_k_weights, weighted, valid)
            chosen = choose(pooled, top_k_weights, index, look, experts * n)
            selection = gather_selection(chosen, index, top_k_weights, look.pairs if valid is None else None)
        if state.gate.reweights:
            full = step.k_active.to(index.device) == state.dial.full_budget
            own_weights = softmax_weights(scores.values, top_k_weights, full)
            part = selection.sub_expert % n
            selection = selection._replace(weight=own_weights[selection.token, selection.slot, part])
        if state.fold is not None:
            state.fold = state.fold.to(index.device)
            selection = folded(selection, state.fold, index)
        if neurons is None:
            out = executor.run(module, hidden_states, selection, n, scores.activations)
        elif isinstance(plan, LadderPlan):
            assert state.neuron_scale is not None  # attached together with the plan
            assert state.shadow is not None
            raised = plan.raised[step.k_active.cpu()]
            out = run_ladder(
                module, state.shadow, hidden_states, selection, n, state.neuron_scale, neurons, raised, executor
            )
        else:
            assert state.neuron_scale is not None  # attached together with the plan
            state.neuron_scale = state.neuron_scale.to(index.device)
            rule = NeuronRule(state.neuron_scale, neurons, block=block)
            out = executor.run_some(module, hidden_states, selection, n, rule)
        if state.compensation is not None:
            weights = top_k_weights if valid is None else top_k_weights.masked_fill(~valid, 0)
            out = state.compensation.apply(out, index, weights, step.k_active, selection)
    bias = down_bias(module)
    if bias is not None:  # an expert's output bias is kept whatever its sub-experts do: it costs nothing
        weights = top_k_weights if valid is None else top_k_weights.masked_fill(~valid, 0)
        out = out + torch.einsum("tk,tkh->th", weights.float(), bias[index].float()).to(out.dtype)
    return out


def _limited(
    state: ElasticLayer,
    limiter: Limiter,
    scores: Tensor,
    weights: Tensor,
    index: Tensor,
    look: StepBudgets,
    step: StepBudgets,
) -> tuple[Selection, StepBudgets]:
    """What runs in the time there is, and the budgets that this comes to."""
    dial, device = state.dial, index.device
    # Time and memory are the host's business, so wherever the layer computes, limiters see tensors on the CPU.
    scores, weights, index, budgets = scores.cpu(), weights.cpu(), index.cpu(), look.k_active.cpu()
    floor = dial.of_layer(torch.full((len(index),), limiter.floor), state.number)
    floor = floor if dial.plan is None else dial.plan.scan[floor]
    pooled = pooled_scores(scores, weights, state.gate.weighted)
    chosen, sure = (
        best_candidates(scores.detach(), weights.detach(), k, state.gate.weighted)
        for k in (budgets, floor.minimum(budgets))
    )
    kept = limiter.limit(state.number, pooled, chosen, sure, index)
    # Where neurons are skipped, the number of sub-experts looked at is not the budget that is paid.
    ran = kept.sum(dim=(1, 2)) if look is step else step.k_active
    selection = gather_candidates(kept, index, weights.detach())
    return Selection(*(values.to(device) for values in selection)), StepBudgets(ran.to(device))


def _share(
    state: ElasticLayer, step: StepBudgets, scores: Tensor, weights: Tensor, valid: Tensor | None
) -> StepBudgets:
    sharing = state.dial.sharing
    assert sharing is not None  # or nobody asked for means
    assert step.means is not None
    assert step.requests is not None
    assert state.thresholds is not None  # attached together with it
    if valid is not None:
        raise PrismError(f"{state.name}: tokens cannot share budgets under expert parallelism; turn sharing off")
    whose = step.means, step.requests
    mine = sharing.share(state.number, *whose, scores, weights, state.gate.weighted, state.thresholds)
    return StepBudgets(mine.to(scores.device), pairs=int(mine.sum()))


def require_state(module: nn.Module, name: str) -> ElasticLayer:
    """The state of a module; raises PrismError if the model is not elastic."""
    state = state_of(module)
    if state is None:
        raise PrismError(
            f"{name} is not elastic; load the model with moe_prism.load_elastic(DIR), or from_pretrained with "
            f'experts_implementation="{IMPLEMENTATION}"'
        )
    return state

"""The experts of one MoE layer in vLLM: the layer of ``elastic``, or at full budget vLLM's own kernel.

A vLLM quantisation method is what owns an expert layer's weights and runs them, so ours takes the place of the
unquantised one. Knows nothing of requests.
"""

from __future__ import annotations

from itertools import count
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel
from vllm.model_executor.layers.fused_moe.prepare_finalize import make_moe_prepare_and_finalize_no_dp_ep
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from ..elastic.compensation import Compensation, OutputScale, Recalibration
from ..elastic.dial import Dial, StepBudgets
from ..elastic.executors import AUTO
from ..elastic.executors.panels import PANELS, Panels, panels_suit, run_whole
from ..elastic.layer import require_state, run_budgets
from ..elastic.model import attach_layer, check_weights, dial_for, runs_whole_sub_experts
from ..errors import UnsupportedModelError
from ..experts.packing import pack
from ..gates import GATES
from . import cpu_collectives, expert_parallel
from .cpu_kernel import NAME, VirtualExperts, all_sub_experts, fits
from .exchange import Exchange
from .expert_parallel import AllExperts
from .setup import SUPPORTED, Setup
from .stacked import GptOssExperts, StackedExperts, forget_weights

_DIAL = "_moe_prism_dial"
_EXCHANGE = "_moe_prism_exchange"
# Tokens of a mixed step up to which all run in one call, since reading is most of its time: measured with 8 of them
# (docs/benchmarks.md), a guess above.
_TOGETHER = 64
_NUMBERS = count()
# By number, which a compiled graph can hold; it must not keep an engine's weights alive.
_METHODS: WeakValueDictionary[int, ElasticMethod] = WeakValueDictionary()


class _Held(NamedTuple):
    """Modules that a method runs but does not own: as attributes of its own they would be its children."""

    experts: StackedExperts
    layer: Any


class Shared(NamedTuple):
    """What the methods of a model have in common.

    Attributes:
        setup: the checkpoint and the plugin's options.
        dial: of the model.
        executor: name of what runs the experts that are here.
        exchange: between data-parallel ranks, if there are several.
    """

    setup: Setup
    dial: Dial
    executor: str
    exchange: Exchange | None


class ElasticMethod(UnquantizedFusedMoEMethod):
    """Weights of one layer, and what runs them.

    Attributes:
        name: of the layer in the checkpoint.
        scale: what vLLM multiplies the layer's output by afterwards.
        moe_kernel: vLLM's own, for full budget, where it keeps the weights.
    """

    moe_kernel: Any

    def __init__(self, moe: Any, shared: Shared, name: str, tensors: dict[str, Tensor], scale: float) -> None:
        super().__init__(moe)
        self.name, self.scale = name, scale
        self._setup, self._dial, self._executor, self._exchange = shared
        self._tensors = tensors
        self._held: _Held | None = None
        self._number = self._setup.elastic.layers.index(name)
        self._id = next(_NUMBERS)
        _METHODS[self._id] = self

    def process_weights_after_loading(self, layer: Any) -> None:
        """Keep what budgets below full need, then let vLLM pack its own."""
        if self._held is None:
            self._held = _Held(self._stacked(layer), layer)
            self._tensors = {}
        if not self._once:
            super().process_weights_after_loading(layer)
            if self._exchange is not None:  # we exchange tokens, so that vLLM's kernel must not
                alone = make_moe_prepare_and_finalize_no_dp_ep(use_monolithic=False)
                self.moe_kernel = FusedMoEKernel(alone, self.moe_kernel.fused_experts)
            return
        for name in ("w13_weight", "w2_weight"):
            getattr(layer, name).data = torch.empty(0, dtype=layer.w2_weight.dtype)

    def _stacked(self, layer: Any) -> StackedExperts:
        elastic = self._setup.elastic
        n = elastic.num_sub_experts
        weights = layer.w13_weight.data, layer.w2_weight.data
        module = StackedExperts(*(w if self._once else w.clone() for w in weights))
        if self.moe.has_bias:
            module = GptOssExperts(*weights, layer.w13_bias.data, layer.w2_bias.data)
        parallel = self.moe.moe_parallel_config
        if parallel.tp_size == parallel.ep_size == 1:
            check_weights(module, self.name, self._tensors)
        if self._executor == NAME:
            module.virtual = VirtualExperts.of(module.gate_up_proj, module.down_proj, n, self.experts_cls.isa)
        elif self._executor == PANELS:
            module.panels = Panels.of(module.gate_up_proj.detach(), module.down_proj.detach(), n)
        whole = AllExperts(module, layer.expert_map, self._executor) if parallel.use_ep else module
        state = attach_layer(whole, self.name, self._dial, elastic, self._tensors)
        if self._executor in (NAME, PANELS):
            forget_weights(module, n, getattr(state.gate, "gate_neurons", 0))
        elif parallel.use_ep:
            pack(module)
        if parallel.tp_rank or parallel.ep_rank:
            _add_nothing(state.compensation)
        return whole

    @property
    def supports_internal_mk(self) -> bool:
        """Whether tokens are exchanged here instead of in vLLM's layer: always, since budgets must come along."""
        return self._exchange is not None or super().supports_internal_mk

    @property
    def _once(self) -> bool:
        """Whether full budget runs on the sub-experts too, so that vLLM need not keep the weights."""
        # vLLM's kernel for CPUs does not know that experts may be elsewhere: it takes their numbers for places
        elsewhere = self.moe.moe_parallel_config.use_ep and current_platform.is_cpu()
        return elsewhere or self._executor == PANELS or (self._executor == NAME and self._setup.options.save_memory)

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """Budgets are looked at now, or in a compiled graph when it runs."""
        if torch.compiler.is_compiling():
            out: Tensor = torch.ops.moe_prism.vllm_experts(x, topk_weights, topk_ids, self._id)
            return out
        return self.run(x, topk_weights, topk_ids)

    def run(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """``[T, H]`` of ``[T, H]`` and the router's ``[T, k]`` weights and ids, of this rank's tokens."""
        if self._exchange is None:
            return self._run(x, topk_weights, topk_ids)
        return self._exchange.combine(self._run(*self._exchange.gather(x, topk_weights, topk_ids)))

    def _run(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        """What is here of the experts, for tokens of all ranks.

        Tokens at full budget need no scores and run apart, beside others too if they are many; a few share the others'
        call on a CPU, since weights that both need are then read once.
        """
        step = self._dial.step(len(x), x.device, self._number)
        if step is None or step.pairs == self._dial.full_budget * len(x):
            return self._whole(x, topk_weights, topk_ids)
        if x.device.type == "cpu" and len(x) <= _TOGETHER:
            return self._below(x, topk_weights, topk_ids, step)
        full = step.k_active == self._dial.full_budget
        if not full.any():
            return self._below(x, topk_weights, topk_ids, step)
        out = torch.empty_like(x)
        out[full] = self._whole(x[full], topk_weights[full], topk_ids[full])
        rest = ~full
        budgets = step.k_active[rest]
        some = StepBudgets(budgets, pairs=int(budgets.sum()))
        out[rest] = self._below(x[rest], topk_weights[rest], topk_ids[rest], some)
        return out

    def _whole(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        assert self._held is not None  # weights were loaded
        module = self._held.experts
        if isinstance(module, AllExperts) and self._once:
            full = self._dial.full_budget
            return self._below(x, topk_weights, topk_ids, StepBudgets(torch.full((len(x),), full), pairs=len(x) * full))
        if module.panels is not None:
            return run_whole(module.panels, x, topk_ids, topk_weights.float())
        if self._once:
            virtual: VirtualExperts = module.virtual
            return virtual.run(x, *all_sub_experts(topk_weights, topk_ids, self._setup.elastic.num_sub_experts))
        own: Tensor = super().apply(self._held.layer, x, topk_weights, topk_ids, None, None)
        return own

    def _below(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, step: StepBudgets) -> Tensor:
        assert self._held is not None  # weights were loaded
        module = self._held.experts
        # what was fitted was fitted to weights and outputs with the scale in them
        weights = topk_weights.float() * self.scale
        out = run_budgets(require_state(module, self.name), module, x, topk_ids.long(), weights, step)
        return out if self.scale == 1.0 else out / self.scale


@torch.library.custom_op("moe_prism::vllm_experts", mutates_args=())
def _experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, number: int) -> Tensor:
    """One opaque call in a compiled graph: budgets are known when it runs, not when it is compiled."""
    return _METHODS[number].run(x, topk_weights, topk_ids)


@_experts.register_fake
def _(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, number: int) -> Tensor:
    return torch.empty_like(x)


def make_elastic(model: nn.Module, setup: Setup) -> Dial:
    """Give every MoE layer of a model that is being built our method; its weights are loaded afterwards.

    Raises:
        UnsupportedModelError: the model or its distribution cannot be run elastically.
    """
    elastic = setup.elastic
    runners = {extract_layer_index(m.layer_name): m for m in model.modules() if isinstance(m, MoERunner)}
    tensors = setup.checkpoint().tensors()
    moe = next(iter(runners.values())).routed_experts.moe_config
    shared = _shared(setup, moe)
    if setup.options.save_memory and shared.executor not in (PANELS, NAME):
        raise UnsupportedModelError(
            "save_memory is for CPUs and for checkpoints whose budgets run whole sub-experts of "
            "32 neurons or somewhat fewer than a multiple of it; leave it out"
        )
    for name in elastic.layers:
        runner = runners.get(extract_layer_index(name))
        if runner is None:
            continue  # on another pipeline stage
        experts = runner.routed_experts
        _refuse(name, runner)
        own = {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}
        scale = float(runner.routed_scaling_factor)
        experts._replace_quant_method(ElasticMethod(experts.moe_config, shared, name, own, scale))
    model.__dict__[_DIAL], model.__dict__[_EXCHANGE] = shared.dial, shared.exchange
    return shared.dial


def _shared(setup: Setup, moe: Any) -> Shared:
    elastic = setup.elastic
    dial, executor = dial_for(elastic), AUTO
    if _runs_whole_sub_experts(setup) and not moe.has_bias:
        if _suits_panels(setup, moe):
            executor = PANELS
        elif fits(elastic.num_neurons, elastic.num_sub_experts):
            executor = NAME
    dial.executor = expert_parallel.NAME if moe.moe_parallel_config.use_ep else executor
    exchange = None
    if moe.moe_parallel_config.dp_size > 1:
        exchange = Exchange(dial)
        if current_platform.is_cpu():
            cpu_collectives.install()
    return Shared(setup, dial, executor, exchange)


def _runs_whole_sub_experts(setup: Setup) -> bool:
    """Whether weights serve products only; else rows are kept for the executors of ``elastic``."""
    gate = GATES.get(setup.elastic.gate)
    rows = gate.reads_weights and not gate.reads_neurons
    return current_platform.is_cpu() and runs_whole_sub_experts(setup.elastic) and not rows


def _suits_panels(setup: Setup, moe: Any) -> bool:
    """Whether panels are faster than vLLM's kernel (docs/results/vllm_kernel.json)."""
    neurons = setup.elastic.num_neurons // moe.moe_parallel_config.tp_size
    return panels_suit(moe.in_dtype, moe.hidden_dim, neurons, setup.elastic.num_sub_experts)


def dial_of_model(model: nn.Module) -> Dial:
    """The dial of a model that ``make_elastic`` saw."""
    dial = model.__dict__.get(_DIAL)
    if not isinstance(dial, Dial):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not served elastically by this plugin; supported: {', '.join(SUPPORTED)}"
        )
    return dial


def exchange_of_model(model: nn.Module) -> Exchange | None:
    """What budgets cross to other data-parallel ranks by, in a model that ``make_elastic`` saw; None without them."""
    found: Exchange | None = model.__dict__[_EXCHANGE]
    return found


def _refuse(name: str, runner: Any) -> None:
    experts = runner.routed_experts
    if type(experts.quant_method) is not UnquantizedFusedMoEMethod:
        raise UnsupportedModelError(f"{name}: quantised experts have no budgets yet; leave --quantization out")
    moe = runner.moe_config
    if (experts.activation, moe.has_bias) not in ((MoEActivation.SILU, False), (MoEActivation.SWIGLUOAI, True)):
        raise UnsupportedModelError(
            f"{name}: only experts that are silu(gate) * up without biases, and those of GPT-OSS, have budgets in "
            "vLLM; serve this checkpoint with `moe-prism serve`"
        )
    parallel = moe.moe_parallel_config
    if moe.has_bias and max(parallel.tp_size, parallel.ep_size) > 1:
        raise UnsupportedModelError(f"{name}: experts with biases cannot be split over processes yet; use one")


def _add_nothing(compensation: Recalibration | None) -> None:
    """What is added to the output of a layer is added by the first rank alone; the others' outputs are added to it."""
    if isinstance(compensation, Compensation):
        compensation.vectors = torch.zeros_like(compensation.vectors)
    elif isinstance(compensation, OutputScale):
        compensation.vectors = compensation.vectors.clone()
        compensation.vectors[:, 1] = 0

"""What this plugin touches inside vLLM, checked before anything is touched.

vLLM promises none of these names. A release that moves one must not serve wrong numbers, so the check fails with the
names that moved. Knows nothing of what the names are used for.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from functools import cache
from typing import Any, NamedTuple

from ..errors import PrismError

MINOR = "0.32"


class Symbol(NamedTuple):
    """One name inside vLLM.

    Attributes:
        path: module and qualified name, ``package.module:Class.method``.
        parameters: names that a callable must still take.
        fields: names that a dataclass must still have.
    """

    path: str
    parameters: tuple[str, ...] = ()
    fields: tuple[str, ...] = ()


_MOE = "vllm.model_executor.layers.fused_moe"
_COMMUNICATORS = "vllm.distributed.device_communicators"
SYMBOLS = (
    Symbol("vllm:ModelRegistry"),
    Symbol(f"{_MOE}.runner.moe_runner:MoERunner.__init__", ("layer_name", "router", "routed_experts")),
    Symbol(f"{_MOE}.runner.moe_runner:MoERunner._apply_quant_method", ("hidden_states", "router_logits")),
    Symbol(f"{_MOE}.routed_experts:RoutedExperts.__init__", ("moe_config", "routed_scaling_factor")),
    Symbol(f"{_MOE}.routed_experts:RoutedExperts._replace_quant_method", ("quant_method",)),
    Symbol(
        f"{_MOE}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod.apply",
        ("layer", "x", "topk_weights", "topk_ids", "shared_experts", "shared_experts_input"),
    ),
    Symbol(f"{_MOE}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod.process_weights_after_loading", ("layer",)),
    Symbol(f"{_MOE}.activation:MoEActivation.SILU"),
    Symbol(f"{_MOE}.activation:MoEActivation.SWIGLUOAI"),
    Symbol(f"{_MOE}.fused_moe_method_base:FusedMoEMethodBase.supports_internal_mk"),
    Symbol(f"{_MOE}.routed_experts:RoutedExperts.expert_map"),
    Symbol(f"{_MOE}.modular_kernel:FusedMoEKernel.__init__", ("prepare_finalize", "fused_experts")),
    Symbol(f"{_MOE}.prepare_finalize:make_moe_prepare_and_finalize_no_dp_ep", ("use_monolithic",)),
    Symbol(
        f"{_MOE}.config:FusedMoEParallelConfig",
        fields=("tp_size", "tp_rank", "dp_size", "ep_size", "ep_rank", "use_ep"),
    ),
    Symbol(
        "vllm.config:ParallelConfig",
        fields=("enable_expert_parallel", "data_parallel_size", "all2all_backend", "enable_eplb", "enable_dbo"),
    ),
    Symbol("vllm.config:ParallelConfig.use_sequence_parallel_moe"),
    Symbol("vllm.forward_context:get_forward_context"),
    Symbol("vllm.forward_context:ForwardContext", fields=("dp_metadata", "additional_kwargs")),
    Symbol("vllm.forward_context:DPMetadata", fields=("local_sizes",)),
    Symbol("vllm.forward_context:DPMetadata.sp_local_sizes", ("sequence_parallel_size",)),
    Symbol("vllm.distributed:get_ep_group"),
    Symbol(
        "vllm.distributed.parallel_state:GroupCoordinator.dispatch",
        ("hidden_states", "topk_weights", "topk_ids", "extra_tensors"),
    ),
    Symbol("vllm.distributed.parallel_state:GroupCoordinator.combine", ("hidden_states",)),
    Symbol(f"{_COMMUNICATORS}.cpu_communicator:CpuCommunicator"),
    Symbol(f"{_COMMUNICATORS}.base_device_communicator:DeviceCommunicatorBase.all_gatherv", ("input_", "dim", "sizes")),
    Symbol(
        f"{_COMMUNICATORS}.base_device_communicator:DeviceCommunicatorBase.reduce_scatterv", ("input_", "dim", "sizes")
    ),
    Symbol("vllm._custom_ops:cpu_fused_moe", ("out", "input", "w13", "w2", "topk_weights", "topk_ids", "act", "isa")),
    Symbol("vllm._custom_ops:cpu_prepack_moe_weight", ("weight", "isa")),
    Symbol(f"{_MOE}.experts.cpu_moe:CPUUnquantizedExperts.isa"),
    Symbol("vllm.model_executor.models.utils:extract_layer_index", ("layer_name",)),
    Symbol("vllm.v1.core.sched.async_scheduler:AsyncScheduler.schedule", ("throttle_prefills",)),
    Symbol("vllm.v1.core.sched.async_scheduler:AsyncScheduler.add_request", ("request",)),
    Symbol(
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler.update_from_output",
        ("scheduler_output", "model_runner_output"),
    ),
    Symbol("vllm.v1.core.sched.async_scheduler:AsyncScheduler._free_request", ("request",)),
    Symbol("vllm.v1.core.sched.async_scheduler:AsyncScheduler.make_stats"),
    Symbol("vllm.v1.core.sched.output:SchedulerOutput", fields=("num_scheduled_tokens", "total_num_scheduled_tokens")),
    Symbol("vllm.v1.request:Request.__init__", ("cache_salt", "block_hasher", "arrival_time", "priority")),
    Symbol("vllm.v1.request:Request.update_block_hashes"),
    Symbol("vllm.v1.metrics.stats:SchedulerStats", fields=("running_lora_adapters",)),
    Symbol("vllm.v1.metrics.loggers:StatLoggerBase.record", ("scheduler_stats", "engine_idx")),
    Symbol("vllm.v1.worker.gpu_worker:Worker.load_model"),
    Symbol("vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model", ("scheduler_output",)),
    Symbol("vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model", ("scheduler_output", "dummy_run")),
    Symbol("vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward", ("input_ids", "inputs_embeds")),
    Symbol("vllm.v1.worker.gpu.model_states.interface:ModelState.prepare_inputs", ("input_batch",)),
    Symbol("vllm.v1.engine.input_processor:InputProcessor.__init__", ("vllm_config",)),
    Symbol("vllm.v1.engine.input_processor:InputProcessor._validate_params", ("params", "supported_tasks")),
    Symbol("vllm.exceptions:VLLMValidationError"),
    Symbol("vllm.triton_utils.dispatcher:_rebind_kernels"),
)


def moved(symbols: tuple[Symbol, ...] = SYMBOLS) -> list[str]:
    """What is not where this plugin expects it, one line each; empty if all is well."""
    found = []
    for symbol in symbols:
        reason = _trouble(symbol)
        if reason is not None:
            found.append(f"{symbol.path} {reason}")
    return found


def _trouble(symbol: Symbol) -> str | None:
    module, _, qualified = symbol.path.partition(":")
    try:
        value: Any = importlib.import_module(module)
    except ImportError as error:
        return f"cannot be imported ({error})"
    for part in filter(None, qualified.split(".")):
        if not hasattr(value, part):
            return f"is gone ({part})"
        value = getattr(value, part)
    if symbol.parameters:
        has = inspect.signature(value).parameters
        missing = [name for name in symbol.parameters if name not in has]
        if missing:
            return f"no longer takes {', '.join(missing)}"
    if symbol.fields:
        names = {field.name for field in dataclasses.fields(value)}
        missing = [name for name in symbol.fields if name not in names]
        if missing:
            return f"no longer has {', '.join(missing)}"
    return None


@cache
def trouble() -> str | None:
    """Why this vLLM cannot be used; None if it can. Found out once a process."""
    import vllm

    version = str(vllm.__version__)
    changed = moved()
    if version.split(".")[:2] == MINOR.split(".") and not changed:
        return None
    what = f"; moved: {'; '.join(changed)}" if changed else ""
    return (
        f"the moe-prism plugin is written for vLLM {MINOR}, this is {version}{what}. Install vllm=={MINOR}.*, or a "
        "moe-prism for this version"
    )


def require() -> None:
    """Raise PrismError, with what moved, for a vLLM that this plugin was not written for."""
    reason = trouble()
    if reason is not None:
        raise PrismError(reason)

"""What a vLLM configuration says about the plugin: which elastic checkpoint it serves, and how.

Knows nothing of requests, of layers or of steps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..checkpoint.read import ElasticCheckpoint, open_checkpoint
from ..checkpoint.schema import CONFIG_KEY, ElasticConfig, parse_elastic_config
from ..errors import PrismError, UnsupportedModelError
from ..scheduling import POLICIES
from .plugin import MODELS

WORKER = "moe_prism.vllm_plugin.worker.ElasticWorker"
SCHEDULER = "moe_prism.vllm_plugin.scheduler.ElasticScheduler"
SUPPORTED = tuple(MODELS)  # architectures that have budgets, by vLLM's names
BUDGETS = "moe_prism_budgets"  # attribute of vLLM's SchedulerOutput: request id -> budget


@dataclass(frozen=True)
class Options:
    """``--additional-config '{"moe_prism": {...}}'``.

    Attributes:
        policy: registered name of the policy that gives budgets.
        k_min: floor of requests that name neither ``k_min`` nor ``k_active``; None: full budget.
        cost_model: file that ``moe-prism vllm-cost`` wrote on this machine; None: load and objectives move nothing.
        save_memory: on a CPU, keep experts once, cut into sub-experts, instead of a second time whole: full budget is
            then some percent slower.
        record: file to which the load and the time of every step are appended, to fit a cost model.
    """

    policy: str = "continuous"
    k_min: int | None = None
    cost_model: str | None = None
    save_memory: bool = False
    record: str | None = None

    @classmethod
    def of(cls, additional_config: Any) -> Options:
        """From vLLM's ``additional_config``; raises PrismError for an unknown key or policy."""
        given = additional_config.get(CONFIG_KEY, {}) if isinstance(additional_config, dict) else {}
        if not isinstance(given, dict):
            raise PrismError(f'additional_config["{CONFIG_KEY}"] must be an object, got {given!r}')
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise PrismError(
                f'additional_config["{CONFIG_KEY}"] has no key {", ".join(unknown)}; known: {", ".join(known)}'
            )
        options = cls(**given)
        POLICIES.get(options.policy)
        return options

    def check(self, full_budget: int) -> None:
        """Raise PrismError for a floor that the checkpoint cannot have."""
        if self.k_min is not None and not 1 <= self.k_min <= full_budget:
            raise PrismError(f"k_min must be from 1 to {full_budget} (full budget), got {self.k_min}")


@dataclass(frozen=True)
class Setup:
    """An elastic checkpoint, served elastically.

    Attributes:
        elastic: its description.
        path: its directory.
        options: of the plugin.
    """

    elastic: ElasticConfig
    path: Path
    options: Options

    @property
    def floor(self) -> int:
        """Floor of requests that name no budget."""
        return self.options.k_min or self.elastic.full_budget

    def checkpoint(self) -> ElasticCheckpoint:
        """Open it; raises CheckpointError."""
        return open_checkpoint(self.path, verify=False)


def setup_of(vllm_config: Any) -> Setup | None:
    """How this engine serves elastically; None for a stock model, or for a checkpoint that is served as the original.

    Raises:
        PrismError: half of the plugin is switched on, or its options are impossible.
    """
    raw = getattr(vllm_config.model_config.hf_config, CONFIG_KEY, None)
    worker = _is(vllm_config.parallel_config.worker_cls, WORKER)
    scheduler = _is(vllm_config.scheduler_config.scheduler_cls, SCHEDULER)
    if not worker and not scheduler:
        return None
    flags = f"--worker-cls {WORKER} --scheduler-cls {SCHEDULER}"
    if worker != scheduler:
        raise PrismError(
            f"only one half of the plugin is on, and budgets need both: give {flags}, or the file of "
            "`moe-prism vllm-config DIR`"
        )
    model = vllm_config.model_config.model
    if raw is None:
        raise PrismError(
            f"{model} is a stock model, which has no budgets: leave {flags} out, or make it elastic first with "
            f"`moe-prism refactor {model} OUT`"
        )
    elastic = parse_elastic_config(raw)
    options = Options.of(vllm_config.additional_config)
    options.check(elastic.full_budget)
    _refuse(vllm_config, elastic)
    return Setup(elastic, _folder(model), options)


def _refuse(vllm_config: Any, elastic: ElasticConfig) -> None:
    """Raise UnsupportedModelError for what budgets do not work with."""
    parallel = vllm_config.parallel_config
    for what, asked, option in (
        ("speculative decoding", vllm_config.speculative_config is not None, "--speculative-config"),
        ("LoRA adapters", vllm_config.lora_config is not None, "--enable-lora"),
        ("transfers of keys and values", vllm_config.kv_transfer_config is not None, "--kv-transfer-config"),
        ("quantised experts", vllm_config.quant_config is not None, "--quantization"),
        ("context parallelism", parallel.prefill_context_parallel_size > 1, "--prefill-context-parallel-size"),
        ("replicas of experts", parallel.enable_eplb, "--enable-eplb"),
        ("two microbatches at a time", parallel.enable_dbo, "--enable-dbo"),
        ("all three kinds of parallelism at once", parallel.use_sequence_parallel_moe, "--enable-expert-parallel"),
        ("this exchange of tokens", _exchanges_otherwise(parallel), f"--all2all-backend {parallel.all2all_backend}"),
    ):
        if asked:
            raise UnsupportedModelError(f"budgets do not work with {what} yet: leave out {option}")
    if vllm_config.device_config.device_type != "cpu" and not vllm_config.model_config.enforce_eager:
        raise UnsupportedModelError("budgets do not work with captured GPU graphs yet: add --enforce-eager")
    processes = parallel.tensor_parallel_size * parallel.data_parallel_size
    if processes > 1:
        _refuse_split(elastic, processes, neuron_ranks(parallel))


def neuron_ranks(parallel: Any) -> int:
    """Over how many processes vLLM spreads the neurons of an expert; it has no tensor parallelism beside experts'."""
    if parallel.enable_expert_parallel:
        return 1
    return int(parallel.tensor_parallel_size * parallel.data_parallel_size)


def _exchanges_otherwise(parallel: Any) -> bool:
    """Whether data-parallel ranks exchange tokens in ways in which budgets cannot come along."""
    return bool(parallel.data_parallel_size > 1 and parallel.all2all_backend != "allgather_reducescatter")


def _refuse_split(elastic: ElasticConfig, processes: int, ranks: int) -> None:
    """Raise UnsupportedModelError for a checkpoint whose selection needs a token's experts whole in one process.

    Args:
        elastic: the checkpoint.
        processes: that the experts are spread over.
        ranks: that each expert's neurons are spread over.
    """
    from ..gates import GATES  # imports torch

    if elastic.scan is not None or elastic.ladder is not None:
        what = "it chooses neurons inside sub-experts, which needs all of a token's neurons in one process"
    elif GATES.get(elastic.gate).reads_weights:
        what = f"its gate ({elastic.gate}) reads the experts' weights"
    elif elastic.num_neurons % (elastic.num_sub_experts * ranks):
        what = f"its sub-experts of {elastic.num_neurons // elastic.num_sub_experts} neurons cannot be cut into {ranks}"
    else:
        return
    raise UnsupportedModelError(
        f"this checkpoint cannot be split over {processes} processes: {what}. Use --tensor-parallel-size 1 and "
        "--data-parallel-size 1, or refactor with gate: static or linear and neurons: all"
    )


def _is(given: Any, name: str) -> bool:
    """Whether a class option of vLLM, a qualified name or a class, names our class."""
    return given == name or (isinstance(given, type) and f"{given.__module__}.{given.__qualname__}" == name)


def _folder(model: str) -> Path:
    path = Path(model).expanduser()
    if not path.is_dir():
        raise PrismError(f"{model} is not a directory: download the elastic checkpoint first and name its directory")
    return path

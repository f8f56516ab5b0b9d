"""vLLM's scheduler, with budgets: they are decided after it has decided who runs, and ride on its output.

Keys and values that were computed at a low budget never serve a request with a higher floor: prefixes are shared within
one class of quality only. Knows nothing of how budgets are carried out.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from ..scheduling import POLICIES, Limits, Request
from . import symbols
from .arguments import quality_of
from .costs import Recorder, cost_model_of
from .counts import Counts
from .planner import Part, Planner, Track
from .setup import BUDGETS, Setup, setup_of

symbols.require()

REPLY = "moe_prism"  # key in the reply's kv_transfer_params, the one field that vLLM passes through to clients


class ElasticScheduler(AsyncScheduler):
    """``AsyncScheduler`` whose output carries a budget per request."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        setup = setup_of(vllm_config)
        assert setup is not None  # this class was asked for
        self._setup: Setup = setup
        cost = cost_model_of(setup, vllm_config)
        limits = Limits(setup.elastic.full_budget, self.max_num_running_reqs)
        self._planner = Planner(POLICIES.get(setup.options.policy)(cost), limits)
        self._counts = Counts(setup.elastic.full_budget)
        record = setup.options.record
        self._recorder = None if record is None else Recorder(Path(record), cost)

    def add_request(self, request: Any) -> None:
        """Note what it asks for; salt its prefix with its class of quality."""
        if request.request_id not in self.requests:
            self._note(request)
        super().add_request(request)

    def _note(self, request: Any) -> None:
        full = self._setup.elastic.full_budget
        extra = request.sampling_params.extra_args if request.sampling_params is not None else None
        quality = quality_of(extra, full, self._setup.floor)
        wanted = Request(
            id=request.request_id,
            arrival=request.arrival_time,
            prompt_tokens=max(1, request.num_prompt_tokens),
            max_tokens=max(1, request.max_tokens),
            k_min=quality.k_min,
            k_active=quality.k_active,
            ttft_ms=quality.ttft_ms,
            tpot_ms=quality.tpot_ms,
            priority=request.priority,
        )
        self._planner.tracks[wanted.id] = Track(wanted)
        if quality.k_min < full:
            salt = f"moe_prism:{quality.k_min}-{quality.k_active}"
            request.cache_salt = salt if request.cache_salt is None else f"{salt}:{request.cache_salt}"
            request.block_hashes.clear()
            request.update_block_hashes()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's step, and a budget for each request in it: how many sub-experts its tokens may run in a layer."""
        out = super().schedule(*args, **kwargs)
        parts = [self._part(id, count) for id, count in out.num_scheduled_tokens.items()]
        waiting = [r.request_id for queue in (self.waiting, self.kv_holding_waiting) for r in queue]
        budgets = self._planner.budgets(parts, waiting, time.time())
        setattr(out, BUDGETS, budgets)  # pickled with the rest where workers are other processes
        for id, budget in budgets.items():
            if not self.requests[id].is_prefill_chunk:  # a token comes of this step
                track = self._planner.tracks[id]
                track.tokens += 1
                track.work += budget
                self._counts.token(track.request, budget)
        if self._recorder is not None:
            tracks = [self._planner.tracks[part.id] for part in parts]
            self._recorder.begin(out, tracks, parts, budgets)
        return out

    def _part(self, id: str, count: int) -> Part:
        request = self.requests[id]
        # vLLM has added this step's tokens to those computed already
        generated = request.num_output_tokens + request.num_output_placeholders
        return Part(id, request.num_computed_tokens - count, count, generated - (not request.is_prefill_chunk))

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """vLLM's outputs; the last one of a request says its mean budget."""
        if self._recorder is not None:
            self._recorder.end(scheduler_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for group in outputs.values():
            for output in group.outputs:
                if output.finished and output.kv_transfer_params is None:
                    track = self._planner.tracks.get(output.request_id)
                    if track is not None:
                        output.kv_transfer_params = {REPLY: {"mean_k_active": round(track.mean_budget, 3)}}
        for id in [id for id in self._planner.tracks if id not in self.requests]:
            del self._planner.tracks[id]
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's, and our counts since the last time, in a field that only LoRA would use otherwise."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.running_lora_adapters.update(self._counts.take())
        return stats

"""Prometheus metrics in the conventions of vLLM's: seconds, histograms, one label with the model's name.

Names that vLLM has too mean the same here, with the prefix ``moe_prism:``. Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ..scheduling import Request
from ..scheduling.quality import budget_buckets
from .token_counts import TokenCounter, TokenHistogram

if TYPE_CHECKING:
    from ..offload import Statistics

PREFIX = "moe_prism:"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

Reason = Literal["stop", "length", "abort", "error"]


@dataclass
class Track:
    """What happened to one generation so far; times are seconds on the clock of its request's arrival.

    Attributes:
        request: as it was asked for.
        first: when its first token came, or None.
        last: when its last token came.
        tokens: how many came.
        work: sum of their budgets.
    """

    request: Request
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    work: int = 0


class _Blocks(Collector):
    """The counts of an offloaded model as metrics."""

    def __init__(self, model: str, counted: Statistics) -> None:
        self._model, self._counted = model, counted

    def collect(self) -> Iterator[Metric]:
        """One family a count."""
        now = self._counted
        for name, text, value in (
            ("offload_hits", "Required blocks that were in memory.", now.hits),
            ("offload_misses", "Required blocks that were not.", now.misses),
            ("offload_read_bytes", "Bytes read from the block file.", now.bytes_read),
            ("offload_stall_seconds", "Time that layers waited for blocks.", now.stall_seconds),
            ("offload_predicted", "Blocks predicted for a next layer.", now.predicted),
            ("offload_predicted_right", "Those of them that it required.", now.predicted_right),
            ("offload_read_ahead", "Blocks whose reading ahead began.", now.ahead),
            ("offload_read_ahead_right", "Those of them that were required.", now.ahead_right),
            ("offload_cancelled", "Reads ahead that were ended because the block was not required.", now.cancelled),
        ):
            family = CounterMetricFamily(PREFIX + name, text, labels=("model_name",))
            family.add_metric((self._model,), value)
            yield family


class Metrics:
    """All metrics of one server, in a registry of their own.

    Args:
        model: value of the label ``model_name``.
        full_budget: largest budget of the histogram.
    """

    def __init__(self, model: str, full_budget: int) -> None:
        self._registry = CollectorRegistry()
        self._model = model
        self._running = self._make(Gauge, "num_requests_running", "Requests that are generating.")
        self._waiting = self._make(Gauge, "num_requests_waiting", "Requests that wait for admission.")
        self._cache = self._make(Gauge, "kv_cache_usage_perc", "Share of the key and value cache in use, 0 to 1.")
        self._prompt = self._make(Counter, "prompt_tokens", "Prompt tokens of accepted requests.")
        self._generated = TokenCounter(PREFIX + "generation_tokens", "Generated tokens.", model)
        self._violations = self._make(Counter, "floor_violations", "Tokens run below their request's floor; stays 0.")
        self._failures = self._make(Counter, "failed_steps", "Engine steps in which a request failed.")
        self._rejected = self._make(Counter, "rejected_requests", "Requests answered 429 or 503.")
        self._ttft = self._histogram("time_to_first_token_seconds", "Time from arrival to the first token.")
        self._gap = TokenHistogram(
            PREFIX + "inter_token_latency_seconds", "Time between two tokens of a request.", model, _SECONDS
        )
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first, of finished requests."
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "Time from arrival to the last token.")
        self._queue = self._histogram("request_queue_time_seconds", "Time from arrival to admission.")
        self._budgets = TokenHistogram(
            PREFIX + "token_k_active",
            "Budgets of generated tokens, in sub-experts.",
            model,
            budget_buckets(full_budget),
        )
        for counts in (self._generated, self._gap, self._budgets):
            self._registry.register(counts)
        labels = ("model_name",)
        self._success = Counter(
            f"{PREFIX}request_success", "Requests that ended.", (*labels, "finished_reason"), registry=self._registry
        )
        self._slo = Counter(
            f"{PREFIX}slo_requests",
            "Finished requests that named the objective, by outcome; attainment is met over all.",
            (*labels, "objective", "outcome"),
            registry=self._registry,
        )
        for reason in ("stop", "length", "abort", "error"):  # so that rates exist from the start
            self._success.labels(model, reason)
        for objective in ("ttft", "tpot"):
            for outcome in ("met", "missed"):
                self._slo.labels(model, objective, outcome)

    def _make(self, kind: Callable[..., Any], name: str, text: str, **options: Any) -> Any:
        made = kind(PREFIX + name, text, ("model_name",), registry=self._registry, **options)
        return made.labels(self._model)

    def _histogram(self, name: str, text: str) -> Any:
        return self._make(Histogram, name, text, buckets=_SECONDS)

    def watch(self, running: Callable[[], float], waiting: Callable[[], float], cache: Callable[[], float]) -> None:
        """Where the gauges are read from, at every scrape."""
        self._running.set_function(running)
        self._waiting.set_function(waiting)
        self._cache.set_function(cache)

    def watch_blocks(self, counted: Statistics) -> None:
        """An offloaded model's counts, which go on; they are read at every scrape."""
        self._registry.register(_Blocks(self._model, counted))

    def arrived(self, prompt_tokens: int) -> None:
        """A generation was accepted."""
        self._prompt.inc(prompt_tokens)

    def admitted(self, seconds: float) -> None:
        """A generation started to run after so long in the queue."""
        self._queue.observe(seconds)

    def rejected(self) -> None:
        """A request found the queue full, or the server about to stop."""
        self._rejected.inc()

    def step_failed(self) -> None:
        """A step failed, as a whole or for some of its requests."""
        self._failures.inc()

    def token(self, track: Track, budget: int, now: float) -> None:
        """A token came; updates ``track``."""
        if track.first is None:
            track.first = now
            self._ttft.observe(now - track.request.arrival)
        else:
            self._gap.observe(now - track.last)
        track.last = now
        track.tokens += 1
        track.work += budget
        self._generated.count += 1
        self._budgets.observe(budget)
        if budget < track.request.k_min:
            self._violations.inc()

    def ended(self, track: Track, reason: Reason) -> None:
        """A generation ended; objectives count where it was not abandoned, and an error misses them."""
        self._success.labels(self._model, reason).inc()
        wanted = track.request
        tpot = None
        if track.first is not None and reason in ("stop", "length"):
            self._e2e.observe(track.last - wanted.arrival)
            tpot = (track.last - track.first) / (track.tokens - 1) if track.tokens > 1 else 0.0
            if track.tokens > 1:
                self._tpot.observe(tpot)
        if reason != "abort":
            ttft = None if track.first is None else track.first - wanted.arrival
            self._objective("ttft", wanted.ttft_ms, ttft)
            self._objective("tpot", wanted.tpot_ms, tpot)

    def _objective(self, name: str, wanted_ms: float | None, seconds: float | None) -> None:
        if wanted_ms is not None:
            met = seconds is not None and seconds * 1e3 <= wanted_ms
            self._slo.labels(self._model, name, "met" if met else "missed").inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

"""Counts of tokens that cost a token next to nothing, as Prometheus histograms and counters.

The client library's own take a lock and a loop over the buckets for every value, which adds up at thousands of tokens a
second. Only one thread counts; a scrape may see a token in one metric and not yet in another.
Knows nothing of requests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class TokenHistogram(Collector):
    """A histogram.

    Args:
        name: of the metric.
        text: what it counts.
        model: value of its label ``model_name``.
        bounds: upper bounds of the buckets, ascending; one without bound comes after them.
    """

    def __init__(self, name: str, text: str, model: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._model = name, text, model
        self._bounds = list(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        """One family."""
        family, passed, buckets = HistogramMetricFamily(self._name, self._text, labels=("model_name",)), 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            passed += count
            buckets.append((floatToGoString(bound), passed))  # type: ignore[no-untyped-call]
        family.add_metric((self._model,), buckets, self._sum)
        yield family


class TokenCounter(Collector):
    """A counter; the arguments are those of ``TokenHistogram``.

    Attributes:
        count: so far.
    """

    def __init__(self, name: str, text: str, model: str) -> None:
        self._name, self._text, self._model = name, text, model
        self.count = 0

    def collect(self) -> Iterator[Metric]:
        """One family."""
        family = CounterMetricFamily(self._name, self._text, labels=("model_name",))
        family.add_metric((self._model,), self.count)
        yield family

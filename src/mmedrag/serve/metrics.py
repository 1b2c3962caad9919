"""Counters of the service in the Prometheus text format, written by ``prometheus_client``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

BOUNDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)  # seconds
COUNTED = {  # by the service's parts, read when asked for
    "mmedrag_queue_depth": (GaugeMetricFamily, "Requests that wait or run."),
    "mmedrag_batches_total": (CounterMetricFamily, "Batches that went through the pipeline."),
    "mmedrag_answers_total": (CounterMetricFamily, "Questions that were answered."),
    "mmedrag_failures_total": (CounterMetricFamily, "Questions on which the pipeline failed."),
    "mmedrag_decoders_replaced_total": (
        CounterMetricFamily,
        "Image decoders that crashed or hung.",
    ),
    "mmedrag_ready": (GaugeMetricFamily, "1 when requests can be answered."),
}


class Metrics:
    """Counts requests by route and status, and their time by route."""

    def __init__(self) -> None:
        disable_created_metrics()  # a second line per counter, of when its counting began
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "mmedrag_requests_total",
            "Requests by route and status.",
            ("route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "mmedrag_request_seconds",
            "Seconds from header to answer, by route.",
            ("route",),
            buckets=BOUNDS,
            registry=self._registry,
        )

    def observe(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self, values: Mapping[str, float]) -> str:
        """The exposition, with ``values`` for the metrics of ``COUNTED``."""
        parts = CollectorRegistry()
        parts.register(_Values(values))
        return (generate_latest(self._registry) + generate_latest(parts)).decode()


class _Values:
    """The present values of ``COUNTED`` as prometheus_client collects them."""

    def __init__(self, values: Mapping[str, float]) -> None:
        self.values = values

    def collect(self) -> Iterator[Metric]:
        for name, (family, what) in COUNTED.items():
            yield family(name, what, value=self.values[name])

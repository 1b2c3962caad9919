"""Counters of the service in the Prometheus text format."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping

BOUNDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
HELP = {
    "mmedrag_requests_total": ("counter", "Requests by route and status."),
    "mmedrag_request_seconds": ("histogram", "Seconds from header to answer, by route."),
    "mmedrag_queue_depth": ("gauge", "Requests that wait or run."),
    "mmedrag_batches_total": ("counter", "Batches that went through the pipeline."),
    "mmedrag_answers_total": ("counter", "Questions that were answered."),
    "mmedrag_failures_total": ("counter", "Questions on which the pipeline failed."),
    "mmedrag_decoders_replaced_total": ("counter", "Image decoders that crashed or hung."),
    "mmedrag_ready": ("gauge", "1 when requests can be answered."),
}


class Metrics:
    """Counts requests; gauges are read when asked for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, int], int] = defaultdict(int)
        self._buckets: dict[str, list[int]] = defaultdict(lambda: [0] * (len(BOUNDS) + 1))
        self._seconds: dict[str, float] = defaultdict(float)

    def saw(self, route: str, status: int, seconds: float) -> None:
        with self._lock:
            self._requests[route, status] += 1
            self._seconds[route] += seconds
            at = next((i for i, bound in enumerate(BOUNDS) if seconds <= bound), len(BOUNDS))
            self._buckets[route][at] += 1

    def text(self, values: Mapping[str, float]) -> str:
        """The exposition, with ``values`` for the metrics without labels."""
        lines: list[str] = []
        with self._lock:
            for name, (kind, what) in HELP.items():
                lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
                if name == "mmedrag_requests_total":
                    lines += [
                        f'{name}{{route="{route}",status="{status}"}} {count}'
                        for (route, status), count in sorted(self._requests.items())
                    ]
                elif kind == "histogram":
                    lines += self._histogram(name)
                else:
                    lines.append(f"{name} {values[name]:g}")
        return "\n".join(lines) + "\n"

    def _histogram(self, name: str) -> list[str]:
        lines = []
        for route, counts in sorted(self._buckets.items()):
            total = 0
            for bound, count in zip([*map(str, BOUNDS), "+Inf"], counts, strict=True):
                total += count
                lines.append(f'{name}_bucket{{route="{route}",le="{bound}"}} {total}')
            lines.append(f'{name}_sum{{route="{route}"}} {self._seconds[route]:.6f}')
            lines.append(f'{name}_count{{route="{route}"}} {total}')
        return lines

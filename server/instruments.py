"""What is measured, and how Prometheus gets it: for the server and the sidecar alike.

Whatever is on a hot path is counted in plain integers and floats, and read out only when Prometheus asks: the
collectors run then, perhaps on another thread, which sees figures that belong to slightly different moments.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import math
from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
    start_http_server,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from server.errors import ConfigError
from server.listening import why_not
from server.restarts import restart_counts

CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"

LATENCY_BOUNDS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
BATCH_BOUNDS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


class Histogram:
    """How often a value fell into each bucket; the bounds are inclusive, as Prometheus has them."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = array("Q", [0] * (len(bounds) + 1))
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    @property
    def buckets(self) -> list[tuple[str, float]]:
        """(inclusive upper bound, how many were at most that), the last bound being infinite."""
        pairs = zip((*self.bounds, math.inf), itertools.accumulate(self.counts), strict=True)
        return [(str(bound) if bound < math.inf else "+Inf", count) for bound, count in pairs]


class RedisFigures:
    """What one server has to do with Redis, over all its connections."""

    __slots__ = ("batch_updates", "mending", "rebuilds", "replays", "round_trip_s")

    def __init__(self) -> None:
        self.batch_updates = Histogram(BATCH_BOUNDS)
        self.round_trip_s = Histogram(LATENCY_BOUNDS_S)
        self.rebuilds = 0
        self.replays = 0
        self.mending = 0
        """Rebuilds and replays that are going on."""


class Answers:
    """What was answered on one route, and how long that took from the moment the request was complete."""

    __slots__ = ("by_status", "ok", "problems", "seconds")

    def __init__(self) -> None:
        self.ok = 0
        """Those with status 200 and no header lines: nearly all."""
        self.by_status: defaultdict[bytes, int] = defaultdict(int)
        self.problems: defaultdict[str, int] = defaultdict(int)
        """By the last part of their type."""
        self.seconds = Histogram(LATENCY_BOUNDS_S)


def counter(name: str, meaning: str, value: float) -> Metric:
    """A counter without labels; `name` without its `_total`."""
    return CounterMetricFamily(name, meaning, value=value)


def gauge(name: str, meaning: str, value: float) -> Metric:
    """A gauge without labels."""
    return GaugeMetricFamily(name, meaning, value=value)


def histogram(name: str, meaning: str, values: Histogram) -> Metric:
    """A histogram without labels."""
    return HistogramMetricFamily(name, meaning, buckets=values.buckets, sum_value=values.sum)


def answers(by_route: Iterable[tuple[str, Answers]]) -> Iterator[Metric]:
    """The metrics of HTTP, by route."""
    requests = CounterMetricFamily("scoreboard_http_requests", "Answers sent.", labels=("route", "status"))
    problems = CounterMetricFamily("scoreboard_http_problems", "Refusals, by problem type.", labels=("route", "kind"))
    seconds = HistogramMetricFamily(
        "scoreboard_http_request_duration_seconds", "From the complete request to its answer.", labels=("route",)
    )
    for route, each in by_route:
        by_status = Counter({b"200": each.ok})
        by_status.update(dict(each.by_status))  # a copy at once: the loop may be adding to it
        for status, count in by_status.items():
            requests.add_metric((route, status.decode()), count)
        for kind, count in list(each.problems.items()):
            problems.add_metric((route, kind), count)
        seconds.add_metric((route,), each.seconds.buckets, each.seconds.sum)
    return iter((requests, problems, seconds))


class Metrics:
    """All metrics of a process: its own, those of Python and of the operating system."""

    def __init__(self, collector: Collector) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(collector)
        self._registry.register(_BuildInfo())
        self._registry.register(_Restarts())
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self._registry)

    def serve(self, host: str, port: int, variable: str) -> None:
        """Answer on a port of their own, from a thread.

        Raises ConfigError, naming `variable`, when the port cannot be had.
        """
        try:
            start_http_server(port, host, self._registry)
        except OSError as error:
            raise ConfigError(why_not(error, host, port, hosts="METRICS_HOST", ports=variable)) from error


class _BuildInfo(Collector):
    def collect(self) -> Iterator[Metric]:
        """prometheus_client: which scoreboard this is."""
        version = importlib.metadata.version("scoreboard")
        yield InfoMetricFamily("scoreboard_build", "Version of the scoreboard.", value={"version": version})


class _Restarts(Collector):
    def collect(self) -> Iterator[Metric]:
        """prometheus_client: what the supervisors above this process had to do; nothing where there is none."""
        restarts = CounterMetricFamily(
            "scoreboard_restarts",
            "How often a process of `all`, `sync` or WORKERS was started again.",
            labels=("process",),
        )
        counts = restart_counts()
        for name, count in counts.items():
            restarts.add_metric((name,), count)
        if counts:
            yield restarts

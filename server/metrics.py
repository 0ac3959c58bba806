"""What /metrics shows: plain integers counted on the way, read out only when Prometheus asks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


class Counters:
    """Counts of one server. Incremented on the hot path, so they are attributes and dict entries, nothing more."""

    def __init__(self) -> None:
        self.answers: defaultdict[tuple[str, int], int] = defaultdict(int)
        """By (route, status)."""

    def count(self, route: str, status: int) -> None:
        """One more answer of `status` on `route`."""
        self.answers[route, status] += 1


class ServerMetrics(Collector):
    """Everything measured in this process, collected when asked."""

    def __init__(self, counters: Counters, gauges: Callable[[], dict[str, tuple[str, float]]]) -> None:
        """`gauges` says by name what each means and its value now."""
        self._counters = counters
        self._gauges = gauges
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        GCCollector(registry=self._registry)

    def collect(self) -> Iterator[Metric]:
        """prometheus_client: all metrics of ours."""
        requests = CounterMetricFamily("scoreboard_http_requests", "Answers sent.", labels=("route", "status"))
        for (route, status), count in self._counters.answers.items():
            requests.add_metric((route, str(status)), count)
        yield requests
        for name, (meaning, value) in self._gauges().items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(name.removesuffix("_total"), meaning, value=value)

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self._registry)

"""What the server counts, in the format of Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)


class Metrics:
    """Counters of one server; ``describe`` gives the scheduler's numbers of the moment."""

    def __init__(self, describe: Callable[[], dict[str, Any]]):
        self._registry = CollectorRegistry()
        counter, histogram = self._counter, self._histogram
        self._requests = counter("requests", "Requests answered.", ("route", "method", "status"))
        self._finished = counter("answers", "Texts generated to their end.", ("reason",))
        self._prompt = counter("prompt_tokens", "Tokens of prompts.", ("source",))
        self._generated = counter("generated_tokens", "Tokens generated.")
        self._seconds = histogram("request_seconds", "Time of a request.", _SECONDS, ("route",))
        self._first = histogram("first_token_seconds", "Time to a text's first token.", _SECONDS)
        self._next = _Times("token_seconds", "Time between a text's tokens.", _TOKEN_SECONDS)
        self._registry.register(self._next)
        self._registry.register(_Scheduler(describe))

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request has its answer, or its client went away."""
        self._requests.labels(route, method, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def first_token(self, seconds: float, prompt: int, cached: int) -> None:
        """A text has its first token, after a prompt of so many tokens."""
        self._first.observe(seconds)
        self._generated.inc()
        self._prompt.labels("cache").inc(cached)
        self._prompt.labels("computed").inc(prompt - cached)

    def next_tokens(self, count: int, seconds: float) -> None:
        """A text has so many more tokens, at least one, so long after the one before them."""
        self._next.observe(count, seconds)
        self._generated.inc(count)

    def ended(self, reason: str) -> None:
        """A text has come to its end."""
        self._finished.labels(reason).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def _counter(self, name: str, help: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"glm_fused_{name}", help, labels, registry=self._registry)

    def _histogram(
        self, name: str, help: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()
    ) -> Histogram:
        full = f"glm_fused_{name}"
        return Histogram(full, help, labels, buckets=buckets, registry=self._registry)


class _Times(Collector):
    """A histogram that takes several times at once, which come for each token."""

    def __init__(self, name: str, help: str, bounds: tuple[float, ...]):
        self._name, self._help, self._bounds = f"glm_fused_{name}", help, bounds
        self._counts, self._seconds = [0] * (len(bounds) + 1), 0.0

    def observe(self, count: int, seconds: float) -> None:
        """So many times, even ones, that are so long together."""
        self._counts[bisect_left(self._bounds, seconds / count)] += count
        self._seconds += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._help, buckets, self._seconds)


class _Scheduler(Collector):
    """The scheduler's numbers of the moment, each a gauge; those in groups have a label."""

    def __init__(self, describe: Callable[[], dict[str, Any]]):
        self._describe = describe

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, value in self._describe().items():
            full = f"glm_fused_scheduler_{name}"
            if _is_number(value):
                yield GaugeMetricFamily(full, f"The scheduler's {name}.", value)
            elif isinstance(value, dict):
                numbers = {key: number for key, number in value.items() if _is_number(number)}
                if numbers:
                    family = GaugeMetricFamily(full, f"The scheduler's {name}.", labels=("kind",))
                    for key, number in numbers.items():
                        family.add_metric((str(key),), number)
                    yield family


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

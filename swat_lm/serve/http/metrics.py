"""What Prometheus may ask: how long the line is, who has slots, how quickly tokens come, and what was answered."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from swat_lm.serve.generation import Event
from swat_lm.serve.host import Host, StepReport

if TYPE_CHECKING:
    from swat_lm.serve.engine import Engine

__all__ = ["Metrics"]

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
STATUSES = ("loading", "ready", "draining", "stopped", "failed")


class Metrics:
    """Of one host and the server before it, in a registry of their own."""

    def __init__(self, host: Host) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "swat_requests", "Answered, by endpoint and status.", ["endpoint", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "swat_request_seconds", "From a request to the end of its answer.", ["endpoint"], buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._first = Histogram(
            "swat_time_to_first_token_seconds", "From the line to a reply's first token.", buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._next = Histogram(
            "swat_time_between_tokens_seconds", "From a reply's token to its next.", buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self._rows = Histogram(
            "swat_batch_rows", "Replies that decode as one batch, by step.", buckets=ROWS, registry=self.registry
        )
        self._steps = Histogram("swat_step_seconds", "One step of the engine.", buckets=SECONDS, registry=self.registry)
        self.registry.register(HostCollector(host))
        host.after_step.append(self._observe)

    def text(self) -> bytes:
        """In Prometheus' own form."""
        return generate_latest(self.registry)

    def watch_reply(self, begin: float) -> Callable[[Event], None]:
        """Who sees the events of one request in line since `begin` and takes their times."""
        last: dict[int, float] = {}

        def see(event: Event) -> None:
            if event.choice is None:
                return
            now = time.monotonic()
            if event.sample in last:
                self._next.observe(now - last[event.sample])
            else:
                self._first.observe(now - begin)
            last[event.sample] = now

        return see

    def _observe(self, engine: "Engine", report: StepReport) -> None:
        self._rows.observe(report.rows)
        self._steps.observe(report.seconds)


class HostCollector(Collector):
    """The host's own numbers, read when they are asked for."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def collect(self) -> Iterable[Metric]:
        """All of them."""
        yield from self._gauges()
        counters = self._host.counters
        for name, value, said in (
            ("swat_tokens_read", counters.tokens_read, "Tokens of prompts that were read."),
            ("swat_tokens_generated", counters.tokens_generated, "Tokens that were drawn."),
            ("swat_engine_steps", counters.steps, "Steps of the engine."),
            ("swat_engine_failed_steps", counters.failed_steps, "Steps that failed as a whole."),
        ):
            yield CounterMetricFamily(name, said, value)

    def _gauges(self) -> Iterator[Metric]:
        now = self._host.gauges()
        yield GaugeMetricFamily("swat_queue_length", "Requests in line.", now.waiting)
        yield GaugeMetricFamily("swat_running_requests", "Requests that have started.", now.running)
        slots = GaugeMetricFamily("swat_slots", "Slots by what is done with them.", labels=["use"])
        for use, count in (("used", now.used_slots), ("kept", now.kept_slots), ("free", now.free_slots)):
            slots.add_metric([use], count)
        yield slots
        status = GaugeMetricFamily("swat_status", "1 for the status that holds.", labels=["status"])
        for name in STATUSES:
            status.add_metric([name], float(name == self._host.status))
        yield status

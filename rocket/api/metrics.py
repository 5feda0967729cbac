"""What the API counts, in Prometheus' terms."""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter as Counts
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from rocket import OutcomeUnknown, Role, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

    from prometheus_client.core import Metric

    from rocket import Answer, Router

_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """Counters and histograms of one application, with a registry of their own."""

    def __init__(self, router: Router[str]) -> None:
        self._registry = CollectorRegistry()
        self._reads = Counter(
            "rocket_reads", "Reads answered.", ["node", "role", "reason"], registry=self._registry
        )
        self._reads_of = functools.cache(self._reads.labels)  # there are a few dozen of them
        self._refused_reads = Counter(
            "rocket_reads_unavailable", "Reads that no node could answer.", registry=self._registry
        )
        self._writes = Counter("rocket_writes", "Writes by outcome.", ["outcome"], registry=self._registry)
        self._read_seconds = Histogram(
            "rocket_read_duration_seconds", "Time to route and answer a read.",
            buckets=_BUCKETS_S, registry=self._registry,
        )  # fmt: skip
        self._write_seconds = Histogram(
            "rocket_write_duration_seconds", "Time to commit a write and settle its floor.",
            buckets=_BUCKETS_S, registry=self._registry,
        )  # fmt: skip
        self._registry.register(_Nodes(router))

    def count_read(self, answer: Answer[Any], began: float) -> None:
        """Count a read that was answered; `began` is in monotonic seconds."""
        self._reads_of(answer.node, answer.role, answer.reason).inc()
        self._read_seconds.observe(time.monotonic() - began)

    def count_refused_read(self) -> None:
        """Count a read that ended in a 503."""
        self._refused_reads.inc()

    @contextlib.contextmanager
    def write(self) -> Iterator[None]:
        """Count and time a write."""
        began = time.monotonic()
        outcome = "failed"
        try:
            yield
            outcome = "committed"
        except OutcomeUnknown:
            outcome = "unknown"
            raise
        except Unavailable:
            outcome = "unavailable"
            raise
        finally:
            self._writes.labels(outcome).inc()
            self._write_seconds.observe(time.monotonic() - began)

    def counts(self) -> dict[str, Any]:
        """Return what was counted so far, as `GET /replicas` tells it; fallbacks are reads by the primary."""
        by_node: Counts[str] = Counts()
        reasons: Counts[str] = Counts()
        fallbacks: Counts[str] = Counts()
        for labels, count in self._counted(self._reads):
            by_node[labels["node"]] += count
            reasons[labels["reason"]] += count
            if labels["role"] == Role.PRIMARY:
                fallbacks[labels["reason"]] += count
        unavailable = sum(count for _, count in self._counted(self._refused_reads))
        return {
            "reads": by_node,
            "reasons": reasons,
            "fallbacks": fallbacks,
            "reads_unavailable": unavailable,
            "writes": {labels["outcome"]: count for labels, count in self._counted(self._writes)},
        }

    @staticmethod
    def _counted(counter: Counter) -> Iterator[tuple[dict[str, str], int]]:
        for metric in counter.collect():
            for sample in metric.samples:
                if sample.name.endswith("_total"):
                    yield sample.labels, int(sample.value)

    def text(self) -> bytes:
        """Return everything in the text format."""
        return generate_latest(self._registry)


class _Nodes:
    """Reads, at the moment of being asked, what the router knows of its nodes."""

    def __init__(self, router: Router[str]) -> None:
        self._router = router

    def collect(self) -> Iterable[Metric]:
        now = time.monotonic()
        lag_bytes = GaugeMetricFamily(
            "rocket_replica_lag_bytes", "WAL that the replica has yet to replay.", labels=["replica"]
        )
        lag_seconds = GaugeMetricFamily(
            "rocket_replica_lag_seconds", "Age of the oldest WAL yet to be replayed.", labels=["replica"]
        )
        age_seconds = GaugeMetricFamily(
            "rocket_replica_status_age_seconds", "Time since the replica was observed.", labels=["replica"]
        )
        for status in self._router.board.replicas:
            age_seconds.add_metric([status.name], now - status.observed_at)
            behind, late = (
                self._router.board.lag_bytes(status),
                self._router.board.lag_seconds(status, now),
            )
            if behind is not None and late is not None:
                lag_bytes.add_metric([status.name], behind)
                lag_seconds.add_metric([status.name], late)
        connections = GaugeMetricFamily(
            "rocket_pool_connections", "Connections by node and state.", labels=["node", "state"]
        )
        for pool in self._router.pools:
            connections.add_metric([pool.name, "in_use"], pool.in_use)
            connections.add_metric([pool.name, "idle"], pool.idle)
        return lag_bytes, lag_seconds, age_seconds, connections

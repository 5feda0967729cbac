"""What the API counts: the router's metrics and the process's own, in a registry of theirs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from rocket import Role
from rocket.metrics import RouterMetrics

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from prometheus_client.core import Metric

    from rocket.lab.api.limits import Admission
    from rocket.lab.comparison import ComparisonRouter


class Metrics(RouterMetrics):
    """The metrics of one application, as `GET /metrics` and `GET /replicas` tell them."""

    def __init__(self, router: ComparisonRouter, admission: Admission) -> None:
        self._admission = admission
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        super().__init__(router, registry=self._registry)

    def counts(self) -> dict[str, Any]:
        """Return what was counted so far, as `GET /replicas` tells it; fallbacks are reads by the primary."""
        by_node: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        fallbacks: Counter[str] = Counter()
        for (node, role, reason), count in self.reads().items():
            by_node[node] += count
            reasons[reason] += count
            if role is Role.PRIMARY:
                fallbacks[reason] += count
        return {
            "reads": by_node,
            "reasons": reasons,
            "fallbacks": fallbacks,
            "reads_unavailable": self.reads_unavailable(),
            "writes": self.writes(),
        }

    def collect(self) -> Iterator[Metric]:
        """Yield what the router's metrics are, and who is let in."""
        yield from super().collect()
        yield CounterMetricFamily(
            "rocket_requests_refused",
            "Requests refused at once, since there were too many.",
            value=self._admission.refused,
        )
        yield GaugeMetricFamily("rocket_requests_inside", "Requests in hand.", value=self._admission.inside)

    def text(self) -> bytes:
        """Return everything in the text format."""
        return generate_latest(self._registry)

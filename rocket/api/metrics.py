"""What the API counts: the router's metrics and the process's own, in a registry of theirs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from rocket import Role
from rocket.metrics import RouterMetrics

if TYPE_CHECKING:
    from typing import Any

    from rocket import Router


class Metrics(RouterMetrics):
    """The metrics of one application, as `GET /metrics` and `GET /replicas` tell them."""

    def __init__(self, router: Router[str]) -> None:
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

    def text(self) -> bytes:
        """Return everything in the text format."""
        return generate_latest(self._registry)

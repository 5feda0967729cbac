"""Totals of what the API has done since its start, for the `tick` of each second."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from prometheus_client.samples import Sample

    from rocket.api.witness import Told

_LATEST = 2000
_FEW_S = 5.0


class Latencies:
    """How long the reads of the last seconds took."""

    def __init__(self) -> None:
        self._latest: deque[tuple[float, float]] = deque(maxlen=_LATEST)

    def add(self, told: Told) -> None:
        """Take account of a read."""
        self._latest.append((told.done, told.done - told.at))

    def percentiles(self, now: float) -> dict[str, float | None]:
        """Return p50 and p99 in milliseconds."""
        while self._latest and self._latest[0][0] < now - _FEW_S:
            self._latest.popleft()
        took = sorted(took_s for _, took_s in self._latest)
        return {
            name: round(took[min(len(took) - 1, int(len(took) * share))] * 1000, 3) if took else None
            for name, share in (("p50_ms", 0.5), ("p99_ms", 0.99))
        }


def totals(samples: Iterable[Sample]) -> dict[str, Any]:
    """Make the figures of a tick of the API's own metrics."""
    reads: defaultdict[str, int] = defaultdict(int)
    reasons: defaultdict[str, int] = defaultdict(int)
    connections: defaultdict[str, dict[str, int]] = defaultdict(dict)
    writes = failed = fallbacks = 0
    for sample in samples:
        value, labels = int(sample.value), sample.labels
        match sample.name:
            case "rocket_reads_total":
                reads[labels["node"]] += value
                reasons[labels["reason"]] += value
                fallbacks += value if labels["role"] == "primary" else 0
            case "rocket_writes_total":
                writes += value if labels["outcome"] == "committed" else 0
                failed += value if labels["outcome"] != "committed" else 0
            case "rocket_reads_unavailable_total":
                failed += value
            case "rocket_pool_connections":
                connections[labels["node"]][labels["state"]] = value
    return {
        "reads": reads,
        "reasons": reasons,
        "writes": writes,
        "failed": failed,
        "waited": reasons.get("caught-up-after-wait", 0),
        "retried": reasons.get("retried", 0),
        "fallbacks": fallbacks,
        "connections": connections,
    }

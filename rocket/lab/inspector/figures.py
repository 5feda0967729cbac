"""Totals of what the API has done since its start, for the `tick` of each second."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from rocket.consistency import Reason

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rocket.lab.api.recorder import RequestRecord

_LATEST = 2000
_FEW_S = 5.0


class Latencies:
    """How long the reads of the last seconds took."""

    def __init__(self) -> None:
        self._latest: deque[tuple[float, float]] = deque(maxlen=_LATEST)

    def add(self, told: RequestRecord) -> None:
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


def totals(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Make the figures of a tick of what the API has counted itself."""
    reasons, writes = counts["reasons"], counts["writes"]
    return {
        "reads": counts["reads"],
        "reasons": reasons,
        "writes": writes.get("committed", 0),
        "failed": counts["reads_unavailable"] + writes.get("unavailable", 0) + writes.get("unknown", 0),
        "waited": reasons.get(Reason.WAITED, 0),
        "retried": reasons.get(Reason.RETRIED, 0),
        "fallbacks": sum(counts["fallbacks"].values()),
    }

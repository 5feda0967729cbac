"""The latest statuses, side by side: all that a routing decision may look at."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rocket.consistency.lsn import Lsn
    from rocket.consistency.status import Epoch, PrimaryStatus, ReplicaStatus

_HISTORY = 600
"""How many advances of the primary are remembered to tell lag in seconds: five minutes at two a second."""


class Board:
    """The last status of each replica and of the primary.

    Has no clock and no lock: the observer writes it and the router reads it on one event loop, and times are
    the caller's monotonic seconds.
    """

    def __init__(self) -> None:
        self._replicas: dict[str, ReplicaStatus] = {}
        self._ring: tuple[ReplicaStatus, ...] | None = ()
        self._primary: PrimaryStatus | None = None
        self.primary_is_lost = False
        """Whether the primary did not answer when it was last asked."""
        self._advances: deque[tuple[Lsn, float]] = deque(maxlen=_HISTORY)

    @property
    def replicas(self) -> Sequence[ReplicaStatus]:
        """Every replica that has a status, in the order in which they were first seen."""
        if self._ring is None:
            self._ring = tuple(self._replicas.values())
        return self._ring

    @property
    def primary(self) -> PrimaryStatus | None:
        """The primary's last status; kept when it is out of reach, since `max_lag` is measured against it."""
        return self._primary

    @property
    def epoch(self) -> Epoch | None:
        """The current reign, as far as it is known."""
        return None if self._primary is None else self._primary.epoch

    def replica(self, name: str) -> ReplicaStatus | None:
        """Return the status of one replica, or None while it has none."""
        return self._replicas.get(name)

    def publish(self, status: ReplicaStatus) -> None:
        """Put a replica's newest status up."""
        self._replicas[status.name] = status
        self._ring = None

    def forget(self, name: str) -> None:
        """Take a replica's status away: it is out of reach, or no longer a replica."""
        if self._replicas.pop(name, None) is not None:
            self._ring = None

    def publish_primary(self, status: PrimaryStatus) -> None:
        """Put the primary's newest status up, and remember when its flush LSN was first seen."""
        self.primary_is_lost = False
        self._primary = status
        if self._advances and status.flush_lsn < self._advances[-1][0]:
            self._advances.clear()  # another cluster, or a promotion that lost a tail: the past is another one's
        if not self._advances or status.flush_lsn > self._advances[-1][0]:
            self._advances.append((status.flush_lsn, status.observed_at))

    def lose_primary(self) -> None:
        """Note that the primary does not answer; what was last seen of it stays."""
        self.primary_is_lost = True

    def lag_bytes(self, status: ReplicaStatus) -> int | None:
        """How much WAL the replica has yet to replay, against the primary's last flush LSN known."""
        if self._primary is None:
            return None
        return max(0, self._primary.flush_lsn - status.replay_lsn)

    def lag_seconds(self, status: ReplicaStatus, now: float) -> float | None:
        """How long ago the primary was first seen beyond what this replica has replayed; 0.0 if it never was.

        The resolution is the observer's interval. What lies before the memory counts from its beginning, so
        the figure is then a lower bound.
        """
        if self._primary is None:
            return None
        first_beyond = bisect_left(self._advances, status.replay_lsn + 1, key=lambda advance: advance[0])
        if first_beyond == len(self._advances):
            return 0.0
        return max(0.0, now - self._advances[first_beyond][1])

"""The latest statuses of all nodes: all that a routing decision may look at."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING

from rocket.consistency.status import timeline_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rocket.consistency.lsn import Lsn
    from rocket.consistency.status import Epoch, PrimaryStatus, ReplicaStatus

_HISTORY = 600
"""How many advances of the primary are kept to compute lag in seconds: five minutes at two a second."""


class Board:
    """The last status of each replica and of the primary.

    Has no clock and no lock: the observer writes it and the router reads it on one event loop, and times are
    the caller's monotonic seconds.
    """

    def __init__(self) -> None:
        self._replicas: dict[str, ReplicaStatus] = {}
        self._ring: tuple[ReplicaStatus, ...] | None = ()
        self.primary: PrimaryStatus | None = None
        """The primary's last status; kept when it is out of reach, since `max_lag` is measured against it."""
        self._distrusted: set[str] = set()
        self._newest_timeline = 0
        self.epoch: Epoch | None = None
        """The current epoch; None while it is unknown, or known to be over before its successor is found."""
        self.primary_is_lost = False
        """Whether the primary did not answer, as a primary, when it was last asked."""
        self.on_new_role: list[Callable[[str], None]] = []
        """Called with a node's name when it is found in another role, or in another epoch, than before."""
        self.on_status: list[Callable[[ReplicaStatus | PrimaryStatus], None]] = []
        """Called with each status that is published."""
        self.on_gone: list[Callable[[str], None]] = []
        """Called with the name of a node whose status is removed."""
        self._advances: deque[tuple[Lsn, float]] = deque(maxlen=_HISTORY)

    @property
    def replicas(self) -> Sequence[ReplicaStatus]:
        """Every replica that has a status, in the order in which they were first seen."""
        if self._ring is None:
            self._ring = tuple(self._replicas.values())
        return self._ring

    def replica(self, name: str) -> ReplicaStatus | None:
        """Return the status of one replica, or None while it has none."""
        return self._replicas.get(name)

    def current_primary(self, now: float, lease_s: float) -> PrimaryStatus | None:
        """Return the primary if it may be used: it answered when it was last asked, at most `lease_s` ago."""
        if self.primary_is_lost or not self.is_current_epoch(self.epoch, now, lease_s):
            return None
        return self.primary

    def is_current_epoch(self, epoch: Epoch | None, now: float, lease_s: float) -> bool:
        """Return whether an epoch was seen to be the current one at most `lease_s` ago."""
        return (
            self.primary is not None
            and epoch is not None
            and epoch == self.epoch
            and now - self.primary.observed_at <= lease_s
        )

    # --- the observer's side ---

    def publish(self, status: ReplicaStatus) -> None:
        """Publish a replica's newest status."""
        if status.epoch is not None and timeline_of(status.epoch) > self._newest_timeline:
            self._newest_timeline = timeline_of(status.epoch)
            self.epoch = None
        if self.primary is not None and self.primary.name == status.name and status.name not in self._replicas:
            self.primary_is_lost = True
            self._notify(status.name)
        if status.name in self._distrusted:
            status = replace(status, incarnation=None)
        self._replicas[status.name] = status
        self._ring = None
        for notify in self.on_status:
            notify(status)

    def distrust(self, name: str) -> None:
        """Have statuses of this name vouch for no connection, since several servers share its address.

        These statuses have no incarnation.
        """
        self._distrusted.add(name)
        if (status := self._replicas.get(name)) is not None:
            self._replicas[name] = replace(status, incarnation=None)
            self._ring = None

    def trust(self, name: str) -> None:
        """Undo `distrust`: the name stands for another server, or for none."""
        self._distrusted.discard(name)

    def forget(self, name: str) -> None:
        """Remove a node's status: it is out of reach. The last status of a primary is kept."""
        known = self._replicas.pop(name, None) is not None
        if known:
            self._ring = None
        if self.primary is not None and self.primary.name == name:
            known = known or not self.primary_is_lost
            self.primary_is_lost = True
        if known:
            for notify in self.on_gone:
                notify(name)

    def publish_primary(self, status: PrimaryStatus) -> bool:
        """Publish a primary's newest status, and remember when its flush LSN was first seen.

        Return False, and have its connections ended, if it is not the one to follow: its timeline is older than
        one that was seen, or it claims the timeline of another primary that still answers. Of two that claim the
        same epoch one is a copy; it has to have as much WAL as the other had.
        """
        if self._replicas.pop(status.name, None) is not None:
            self._ring = None
            self._notify(status.name)  # what was opened to a replica shall not read from a primary
        before = self.primary
        if timeline_of(status.epoch) < self._newest_timeline or (
            before is not None and before.name != status.name and not self._may_succeed(status, before)
        ):
            self._notify(status.name)
            return False
        self._newest_timeline = timeline_of(status.epoch)
        self.epoch = status.epoch
        self.primary = status
        self.primary_is_lost = False
        if before is not None and (before.name, before.epoch) != (status.name, status.epoch):
            self._advances.clear()  # they are another primary's
            for name in {before.name, status.name}:
                self._notify(name)
        if self._advances and status.flush_lsn < self._advances[-1][0]:
            self._advances.clear()  # another cluster under the same name
        if not self._advances or status.flush_lsn > self._advances[-1][0]:
            self._advances.append((status.flush_lsn, status.observed_at))
        for notify in self.on_status:
            notify(status)
        return True

    def _may_succeed(self, status: PrimaryStatus, before: PrimaryStatus) -> bool:
        if timeline_of(status.epoch) > timeline_of(before.epoch):
            return True
        return self.primary_is_lost and (status.epoch != before.epoch or status.flush_lsn >= before.flush_lsn)

    def _notify(self, name: str) -> None:
        for notify in self.on_new_role:
            notify(name)

    # --- lag ---

    def lag_bytes(self, status: ReplicaStatus) -> int | None:
        """Return how much WAL the replica has yet to replay, against the primary's last flush LSN known."""
        if self.primary is None:
            return None
        return max(0, self.primary.flush_lsn - status.replay_lsn)

    def lag_seconds(self, status: ReplicaStatus, now: float) -> float | None:
        """Return how long ago the primary was first seen beyond what a replica has replayed; 0.0 if it never was.

        The resolution is the observer's interval. A replica behind all that is remembered gets the age of the
        oldest memory, which is a lower bound.
        """
        if self.primary is None:
            return None
        first_beyond = bisect_left(self._advances, status.replay_lsn + 1, key=lambda advance: advance[0])
        if first_beyond == len(self._advances):
            return 0.0
        return max(0.0, now - self._advances[first_beyond][1])

    def has_diverged(self, status: ReplicaStatus) -> bool:
        """Return whether a replica has replayed more than its primary had flushed when that was asked later.

        Then what it has replayed is not, or not all, that primary's WAL.
        """
        return (
            self.primary is not None
            and self.primary.observed_at >= status.answered_at
            and self.primary.flush_lsn < status.replay_lsn
        )

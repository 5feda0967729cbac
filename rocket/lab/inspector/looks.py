"""Which of the observer's looks at replicas are told of: while reads wait there are a thousand a second."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rocket.consistency import ReplicaStatus

    Look = tuple[float, ReplicaStatus]

_STILL_S = 0.1
"""So often one is told of, though nothing has changed."""
_AT_ONCE = 20
"""Between two batches, of all replicas."""


class Looks:
    """Leaves out what says nothing new, but for the last look before each change: the change came in between."""

    def __init__(self) -> None:
        self._told: dict[str, Look] = {}
        self._held: dict[str, Look] = {}
        self._allowance = _AT_ONCE

    def refill(self) -> None:
        """Begin another batch."""
        self._allowance = _AT_ONCE

    def worth_telling(self, status: ReplicaStatus, at: float) -> list[Look]:
        """Return the looks to tell of now that there is another one."""
        before = self._told.get(status.name)
        look = (at, status)
        held = self._held.pop(status.name, None)
        changed = before is None or _what(before[1]) != _what(status)
        if self._allowance < 1 or not (changed or before is None or at - before[0] >= _STILL_S):
            self._held[status.name] = look
            return []
        looks = [held, look] if held is not None and changed else [look]
        self._allowance -= len(looks)
        self._told[status.name] = look
        return looks

    def forget(self, name: str) -> None:
        """Take the next look at a replica for the first one."""
        self._told.pop(name, None)
        self._held.pop(name, None)


def _what(status: ReplicaStatus) -> tuple[object, ...]:
    return status.replay_lsn, status.receive_lsn, status.streaming, status.incarnation, status.epoch

"""The rules by which reads can be routed."""

from __future__ import annotations

import enum

from rocket.routing.writer import FloorTaken


class Routing(enum.StrEnum):
    """How reads are routed. Only the first keeps the guarantee; the others are there to compare it with.

    Nor does it cover what was written under another one, which records no floor that holds; but see
    `Router.switch`.
    """

    NEVER_STALE = "never-stale"
    ARTICLE = "article"
    """As published: floor taken inside the transaction, replicas looked up in `replica_statuses`."""
    RANDOM = "random"
    """Any replica."""
    PRIMARY = "primary"
    """No replica."""

    @property
    def floor_taken(self) -> FloorTaken:
        """When the floor of a write is taken."""
        return _FLOOR_TAKEN[self]


_FLOOR_TAKEN = {
    Routing.NEVER_STALE: FloorTaken.AFTER_COMMIT,
    Routing.ARTICLE: FloorTaken.INSIDE,
    Routing.RANDOM: FloorTaken.NEVER,
    Routing.PRIMARY: FloorTaken.NEVER,
}

"""The rules by which reads can be routed."""

from __future__ import annotations

import enum

from rocket.routing.writes import FloorTaken


class Routing(enum.StrEnum):
    """How reads are routed. Only the first keeps the guarantee; the others are there to compare it with.

    Nor does it cover what was written under another one, which records no floor that holds; but see
    `Router.switch`.
    """

    NEVER_STALE = "never-stale"
    ARTICLE = "article"
    """As published: floor taken inside the transaction, replicas looked up in `replica_statuses`.

    On asyncpg's pool as it comes, which resets each connection when it gets it back.
    """
    RANDOM = "random"
    """Any replica."""
    PRIMARY = "primary"
    """No replica."""

    @property
    def floor_taken(self) -> FloorTaken:
        """When the floor of a write is taken."""
        return _FLOOR_TAKEN[self]

    @property
    def as_asyncpg_comes(self) -> bool:
        """Whether pools do what asyncpg's do unless they are told otherwise."""
        return self is Routing.ARTICLE


_FLOOR_TAKEN = {
    Routing.NEVER_STALE: FloorTaken.AFTER_COMMIT,
    Routing.ARTICLE: FloorTaken.INSIDE,
    Routing.RANDOM: FloorTaken.NEVER,
    Routing.PRIMARY: FloorTaken.NEVER,
}

"""What a read may have shown: an upper bound, taken on the same connection after it.

Visibility only grows, so a bound that is taken later covers what was seen before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rocket.consistency import Lsn

if TYPE_CHECKING:
    from rocket.consistency import Epoch
    from rocket.routing.connections import Connection

_ON_REPLICA = """
    SELECT pg_is_in_recovery() AS in_recovery,
           CASE WHEN pg_last_wal_receive_lsn() >= pg_last_wal_replay_lsn()
                 AND EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming')
                THEN pg_last_wal_receive_lsn()
           END AS bound,
           (SELECT epoch FROM epochs ORDER BY timeline DESC LIMIT 1) AS epoch
"""
_ON_PRIMARY = "SELECT pg_current_wal_flush_lsn()"


class NotAReplicaAnyMore(ConnectionError):
    """The server was promoted, and the connection outlived that (design fact F14)."""


class FollowsAnotherReign(ConnectionError):
    """The replica has gone on to another primary's reign since it was observed."""


async def shown_by_replica(replica: Connection, epoch: Epoch) -> Lsn | None:
    """Return an LSN that covers all that a replica can have shown on this connection, None if it cannot be told.

    Replay makes a commit visible before it moves the replay LSN, so that is no bound; the end of what has been
    received is one, as long as it comes from the stream (design fact F6). That LSN is one of `epoch`: raise
    `FollowsAnotherReign` if the replica shows another one by now, and `NotAReplicaAnyMore`.
    """
    row = await replica.fetchrow(_ON_REPLICA)
    if row is None or not row["in_recovery"]:
        raise NotAReplicaAnyMore("the server is no replica any more")
    if row["epoch"] != epoch:
        raise FollowsAnotherReign(f"it shows epoch {row['epoch']} and not {epoch}")
    return None if row["bound"] is None else Lsn.from_wire(row["bound"])


async def shown_by_primary(primary: Connection) -> Lsn:
    """Return an LSN that covers all that the primary can have shown; raise asyncpg's error on a replica."""
    return Lsn.from_wire(await primary.fetchval(_ON_PRIMARY))

"""What a read may have shown: an upper bound, taken on the same connection after it.

Visibility only grows, so a bound that is taken later covers what was seen before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rocket.consistency import Lsn, timeline_of

if TYPE_CHECKING:
    from rocket.consistency import Epoch
    from rocket.routing.connections import Connection

_ON_REPLICA = """
    SELECT now.in_recovery, now.replay_lsn, now.receive_lsn,
           (SELECT received_tli FROM pg_stat_wal_receiver WHERE status = 'streaming') AS streamed_timeline,
           (SELECT epoch FROM epochs ORDER BY timeline DESC LIMIT 1) AS epoch
      FROM (SELECT pg_is_in_recovery() AS in_recovery,
                   pg_last_wal_replay_lsn() AS replay_lsn,
                   pg_last_wal_receive_lsn() AS receive_lsn
            OFFSET 0) AS now
"""
"""The positions come first: a timeline that is streamed after they were read is, at the earliest, theirs."""

_ON_PRIMARY = """
    SELECT pg_current_wal_flush_lsn() AS flush_lsn,
           ('x' || substr(pg_walfile_name(pg_current_wal_flush_lsn()), 1, 8))::bit(32)::int AS timeline
"""


class NotAReplicaAnyMore(ConnectionError):
    """The server was promoted, and the connection outlived that (design fact F14)."""


class OfAnotherReign(ConnectionError):
    """The server has gone on to another primary's reign since it was observed."""


async def shown_by_replica(replica: Connection, epoch: Epoch) -> Lsn | None:
    """Return an LSN that covers all that a replica can have shown on this connection, None if it cannot be told.

    Replay makes a commit visible before it moves the replay LSN, so that is no bound; the end of what has been
    received is one, as long as it comes from the stream (design fact F6). That LSN is one of `epoch`: raise
    `OfAnotherReign` if the replica shows or streams another one by now, and `NotAReplicaAnyMore`.
    """
    row = await replica.fetchrow(_ON_REPLICA)
    if row is None or not row["in_recovery"]:
        raise NotAReplicaAnyMore("the server is no replica any more")
    if row["epoch"] != epoch:
        raise OfAnotherReign(f"it shows epoch {row['epoch']} and not {epoch}")
    streamed = row["streamed_timeline"]
    if streamed is None or row["receive_lsn"] is None:
        return None
    if streamed != timeline_of(epoch):
        raise OfAnotherReign(f"it streams timeline {streamed} and not that of {epoch}")
    replayed, received = Lsn.from_wire(row["replay_lsn"]), Lsn.from_wire(row["receive_lsn"])
    return received if received >= replayed else None


async def shown_by_primary(primary: Connection, epoch: Epoch) -> Lsn:
    """Return an LSN that covers all that the primary can have shown.

    Raise asyncpg's error on a replica, and `OfAnotherReign` on a server that writes another timeline than `epoch`.
    """
    row = await primary.fetchrow(_ON_PRIMARY)
    assert row is not None  # noqa: S101 - it has no FROM
    if row["timeline"] != timeline_of(epoch):
        raise OfAnotherReign(f"the primary writes timeline {row['timeline']}, and its reign was {epoch}")
    return Lsn.from_wire(row["flush_lsn"])

"""What a replica says of itself when it is asked in one statement: the observer does, and a read that checks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rocket.consistency import Epoch, Lsn, ReplicaStatus, timeline_of
from rocket.routing.epochs import NEWEST_SHOWN
from rocket.routing.failures import NotAsObserved

if TYPE_CHECKING:
    from asyncpg import Record

    from rocket.consistency import Incarnation

STATUS_QUERY = f"""
    SELECT now.in_recovery, now.replay_lsn, now.receive_lsn,
           (SELECT CASE WHEN status = 'streaming' THEN received_tli END FROM pg_stat_wal_receiver
           ) AS streamed_timeline,
           (SELECT pid IS NOT NULL AND status IS NULL FROM pg_stat_wal_receiver) AS receiver_is_hidden,
           {NEWEST_SHOWN} AS epoch,
           (SELECT min_recovery_end_timeline FROM pg_control_recovery()) AS applied_timeline
      FROM (SELECT pg_is_in_recovery() AS in_recovery,
                   pg_last_wal_replay_lsn() AS replay_lsn,
                   pg_last_wal_receive_lsn() AS receive_lsn
            OFFSET 0) AS now
"""  # noqa: S608 - our own text
"""The positions come first: a timeline that is streamed after they were read is, at the earliest, theirs."""


def replica_status_from(name: str, row: Record, incarnation: Incarnation | None, asked_at: float) -> ReplicaStatus:
    """Return the status that a row of `STATUS_QUERY` gives; raise `NotAsObserved` if the node replays nothing.

    A role that may not know the incarnation is not told either what is streamed, but that something is.
    """
    if row["replay_lsn"] is None:
        raise NotAsObserved("it replays nothing")
    shows = None if row["epoch"] is None else Epoch(row["epoch"])
    # The row alone is no proof: see `epochs`.
    epoch = None if shows is None or row["applied_timeline"] != timeline_of(shows) else shows
    hidden = incarnation is None and bool(row["receiver_is_hidden"])
    return ReplicaStatus(
        name=name,
        replay_lsn=Lsn.from_wire(row["replay_lsn"]),
        incarnation=incarnation,
        observed_at=asked_at,
        answered_at=time.monotonic(),
        receive_lsn=None if row["receive_lsn"] is None else Lsn.from_wire(row["receive_lsn"]),
        streaming=epoch is not None and (hidden or row["streamed_timeline"] == timeline_of(epoch)),
        epoch=epoch,
    )

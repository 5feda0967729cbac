"""What a read may have shown: an upper bound, taken with it or, on the same connection, after it.

A statement's snapshot is taken before anything in it is evaluated, and visibility only grows: a bound taken within
a read's own statement, or later, covers what the read saw.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, TypeVar

from rocket.consistency import Lsn, timeline_of
from rocket.routing.connection import MAYBE_OWN, answers, unwrap
from rocket.routing.epochs import NEWEST_SHOWN
from rocket.routing.failures import NodeChanged, OwnError

if TYPE_CHECKING:
    from rocket.consistency import Epoch
    from rocket.routing.connection import Connection, NodeConnection, Work

ResultT = TypeVar("ResultT")

READ_BOUND = """(
    SELECT CASE WHEN now.in_recovery THEN
               'replica ' || now.replay_lsn::text || ' ' || coalesce(now.receive_lsn::text, '-') || ' ' ||
               CASE WHEN (now.receiver).status = 'streaming' THEN (now.receiver).received_tli ELSE 0 END::text
           ELSE
               concat_ws(' ', 'primary', pg_current_wal_flush_lsn(),
                         ('x' || substr(pg_walfile_name(pg_current_wal_flush_lsn()), 1, 8))::bit(32)::int)
           END
      FROM (SELECT pg_is_in_recovery() AS in_recovery,
                   pg_last_wal_replay_lsn() AS replay_lsn,
                   pg_last_wal_receive_lsn() AS receive_lsn,
                   pg_stat_get_wal_receiver() AS receiver
            OFFSET 0) AS now
)"""
"""A column for a read's own statement: what the read can have shown, once it is handed to `report_read_bound`.

The statement must have a single snapshot: a volatile function that reads tables, as functions are unless they are
declared otherwise, sees what was committed meanwhile, beyond the bound. Leave this out beside such a one.

The positions come first: a timeline that is streamed after they were read is, at the earliest, theirs. A replica
that streams the timeline on which it was observed, in the same incarnation, still follows the same reign: it never
goes back to an earlier timeline. Every read pays for this, so it touches no table, and calls the function of
`pg_stat_wal_receiver` where it costs the least.
"""

ASKED = f"SELECT {READ_BOUND}"
"""The same in a statement of its own."""

_NOT_STREAMING = " 0"
_SHOWS = f"SELECT coalesce({NEWEST_SHOWN}, '-')"
"""Where a replica does not stream, the newest reign's row tells, also afterwards: it never goes back."""


class NoLongerReplica(NodeChanged):
    """The server was promoted, and the connection outlived that (design fact F14)."""


class EpochChanged(NodeChanged):
    """The server has gone on to another primary's reign since it was observed."""


async def with_what_was_said(work: Work[ResultT], node: Connection) -> tuple[ResultT, str]:
    """Run work; return its result with what the node said of itself in the last statement, or says when asked."""
    connection = unwrap(node)
    connection.note(None)  # one may have been left by a read that failed
    try:
        value = await work(node)
    except MAYBE_OWN as error:
        if answers(connection):
            raise OwnError(error) from error
        raise
    said = connection.take_note()
    if said is None or said.endswith(_NOT_STREAMING):
        said = await _ask(connection, said)
    return value, said


async def read_on_replica(
    work: Work[ResultT], epoch: Epoch, replica: Connection
) -> tuple[ResultT, str, Lsn | None]:
    """Run work on a replica of `epoch`; return its result, what was said, and the bound that follows.

    Raise as `shown_by_replica` does. In one piece with what `with_what_was_said` does: most reads come this way.
    """
    connection = unwrap(replica)
    connection.note(None)
    try:
        value = await work(replica)
    except MAYBE_OWN as error:
        if answers(connection):
            raise OwnError(error) from error
        raise
    said = connection.take_note()
    if said is None or said.endswith(_NOT_STREAMING):
        said = await _ask(connection, said)
    return value, said, shown_by_replica(said, epoch)


async def _ask(connection: NodeConnection, said: str | None) -> str:
    """Let a node say what it did not say by itself, or not in full."""
    if said is None:
        said = str(await connection.fetchval(ASKED))
    if said.startswith("replica") and said.endswith(_NOT_STREAMING):
        said = f"{said} {await connection.fetchval(_SHOWS)}"
    return said


def report_read_bound(node: Connection, shown: str | None) -> None:
    """Hand the router the column `READ_BOUND` of the statement that was the last one on this connection.

    That saves the router a statement of its own after a read. It is not used if another statement came after that.
    """
    unwrap(node).note(shown)


@functools.lru_cache(maxsize=256)
def shown_by_replica(said: str, epoch: Epoch) -> Lsn | None:
    """Return an LSN that covers all that a replica can have shown by then, None if it cannot be told.

    Replay makes a commit visible before it moves the replay LSN, so that is no bound; the end of what has been
    received is one, as long as it comes from the stream (design fact F6). That LSN is one of `epoch`: raise
    `EpochChanged` if the replica shows or streams another one by now, and `NoLongerReplica`.
    """
    role, *rest = said.split(" ")
    if role != "replica":
        raise NoLongerReplica("the server is no replica any more")
    replay_lsn, receive_lsn, streamed, *shows = rest
    if streamed == "0":
        if shows != [epoch]:
            raise EpochChanged(f"it shows epoch {' '.join(shows)} and not {epoch}")
        return None
    if int(streamed) != timeline_of(epoch):
        raise EpochChanged(f"it streams timeline {streamed} and not that of {epoch}")
    if receive_lsn == "-":
        return None
    received = Lsn.parse(receive_lsn)
    return received if received >= Lsn.parse(replay_lsn) else None


def shown_by_primary(said: str, epoch: Epoch) -> Lsn:
    """Return an LSN that covers all that the primary can have shown by then.

    Raise `EpochChanged` if it is a replica, or writes another timeline than that of `epoch`.
    """
    role, flush_lsn, timeline, *_ = said.split(" ")
    if role != "primary" or int(timeline) != timeline_of(epoch):
        raise EpochChanged(f"the server is not, or no longer, the primary of epoch {epoch}")
    return Lsn.parse(flush_lsn)

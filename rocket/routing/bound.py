"""What a read may have shown: an upper bound, taken with it or, on the same connection, after it.

A statement's snapshot is taken before anything in it is evaluated, and visibility only grows: a bound taken within
a read's own statement, or later, covers what the read saw.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import asyncpg

from rocket.consistency import Epoch, Lsn, timeline_of
from rocket.errors import TransactionEnded
from rocket.routing.connection import answers, is_lost, unwrap
from rocket.routing.epochs import NEWEST_SHOWN
from rocket.routing.failures import NodeChanged, OwnError, speaks_against_node

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from rocket.routing.connection import Connection, Isolation, NodeConnection, Work

ResultT = TypeVar("ResultT")
ShownT = TypeVar("ShownT", Lsn, Lsn | None)

LOOK_S = 1.0
"""How long a node is waited for after an error of work: it is asked what it had shown by then."""

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
declared otherwise, sees what was committed meanwhile, beyond the bound. Leave this column out of a statement that
calls one.

The positions come first: a timeline that is streamed after they were read is, at the earliest, theirs. A replica
that streams the timeline on which it was observed, in the same incarnation, still follows the same primary: it
never goes back to an earlier timeline. Every read pays for this column, so it touches no table, and calls the
function of `pg_stat_wal_receiver` where it costs the least.
"""

_ASK = f"SELECT {READ_BOUND}"
_NEWEST_EPOCH = f"SELECT {NEWEST_SHOWN}"


class NoLongerReplica(NodeChanged):
    """The server was promoted, and the connection outlived that (design fact F14)."""


class EpochChanged(NodeChanged):
    """The server follows another primary than when it was observed."""


@dataclass(frozen=True, slots=True)
class ReadBound:
    """What a node said of itself with a read, or after it: from this follows what the read can have shown."""

    lsn: Lsn
    """The replay LSN of a replica, the flush LSN of a primary."""
    timeline: int
    """The timeline that a primary writes or a replica streams; 0 if it does not stream."""
    is_replica: bool
    receive_lsn: Lsn | None = None
    """The end of the WAL that a replica has received; None where that is unknown, and on a primary."""
    epoch: Epoch | None = None
    """The newest epoch whose row is visible on a replica that does not stream; never asked of others."""

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def parse(text: str) -> ReadBound:
        """Return what the text of a column `READ_BOUND` says; raise `ValueError` for all else."""
        match text.split(" "):
            case ["replica", replay_lsn, receive_lsn, timeline]:
                received = None if receive_lsn == "-" else Lsn.parse(receive_lsn)
                return ReadBound(Lsn.parse(replay_lsn), int(timeline), is_replica=True, receive_lsn=received)
            case ["primary", flush_lsn, timeline]:
                return ReadBound(Lsn.parse(flush_lsn), int(timeline), is_replica=False)
        raise ValueError(f"not a read bound: {text!r}")

    def on_replica(self, epoch: Epoch) -> Lsn | None:
        """Return an LSN that covers all that a replica can have shown by then, None if there is no bound.

        Replay makes a commit visible before it moves the replay LSN, so that is no bound; the end of the received
        WAL is one, as long as it comes from the stream (design fact F6). That LSN belongs to `epoch`: raise
        `EpochChanged` if the replica shows or streams another one by now, and `NoLongerReplica`.
        """
        if not self.is_replica:
            raise NoLongerReplica("the server is no replica any more")
        if self.timeline == 0:
            if self.epoch != epoch:
                raise EpochChanged(f"it shows epoch {self.epoch or '-'} and not {epoch}")
            return None
        if self.timeline != timeline_of(epoch):
            raise EpochChanged(f"it streams timeline {self.timeline} and not that of {epoch}")
        if self.receive_lsn is None or self.receive_lsn < self.lsn:
            return None
        return self.receive_lsn

    def on_primary(self, epoch: Epoch) -> Lsn:
        """Return an LSN that covers all that the primary can have shown by then.

        Raise `EpochChanged` if it is a replica, or writes another timeline than that of `epoch`.
        """
        if self.is_replica or self.timeline != timeline_of(epoch):
            raise EpochChanged(f"the server is not, or no longer, the primary of epoch {epoch}")
        return self.lsn


def report_read_bound(node: Connection, bound: str | None) -> None:
    """Hand the router the column `READ_BOUND` of the statement that was the last one on this connection.

    That saves the router a statement of its own after a read. It is not used if another statement came after that.
    """
    connection = unwrap(node)
    connection.reported = None if bound is None else (bound, connection.statements)


def begun(work: Work[ResultT], node: Connection) -> Awaitable[ResultT]:
    """Call work; raise `TypeError` if that gives nothing to await."""
    doing = work(node)
    if type(doing) is not types.CoroutineType and not inspect.isawaitable(doing):
        raise TypeError(f"work has to be a coroutine function, and {work!r} returned a {type(doing).__name__}")
    return doing


def in_transaction(
    work: Work[ResultT], isolation: Isolation | None, settings: Mapping[str, str] | None
) -> Work[ResultT]:
    """Return work of a read that runs in a transaction of its own, if the read asks for something of one."""
    if isolation is None and not settings:
        return work

    async def inside(node: Connection) -> ResultT:
        async with node.transaction(isolation=isolation, readonly=True):
            await apply_settings(node, settings)
            return await begun(work, node)

    return inside


_SET = "SELECT set_config(name, value, true) FROM unnest($1::text[], $2::text[]) AS given (name, value)"


async def apply_settings(node: Connection, settings: Mapping[str, str] | None) -> None:
    """Set settings for the transaction that has begun."""
    if settings:
        await node.execute(_SET, list(settings.keys()), list(settings.values()))


async def run_bounded(
    work: Work[ResultT], node: Connection, covers: Callable[[ReadBound, Epoch], ShownT], epoch: Epoch
) -> tuple[ResultT, ReadBound, ShownT]:
    """Run work; return its result with the bound that it has reported, or else the node is asked for.

    The third is what that covers, by the method `covers` of `ReadBound`, of a node of `epoch`. What work has read
    leaves it by an error as well: raise `OwnError`, with what that may tell, unless it is the failure of the node.
    """
    connection = unwrap(node)
    connection.reported = None  # a failed read may have left one
    try:
        value = await begun(work, node)
    except Exception as error:
        if not is_own(error, connection):
            raise
        shown = await _bound_after_error(connection)
        raise OwnError(error, None if shown is None else covers(shown, epoch)) from error
    if not (connection.direct or connection.is_in_transaction()):
        raise OwnError(TransactionEnded("this work has ended the transaction that proves where it reads"))
    text = _reported(connection)
    if text is None:
        bound = await ask_bound(connection)
    else:
        bound = ReadBound.parse(text)
        if not bound.timeline:
            bound = await _with_epoch(connection, bound)
    return value, bound, covers(bound, epoch)


async def run_unbounded(work: Work[ResultT], node: Connection) -> ResultT:
    """Run work for a read that promises nothing, so that its node is not asked for a bound."""
    try:
        return await begun(work, node)
    except Exception as error:
        if not is_own(error, unwrap(node)):
            raise
        raise OwnError(error) from error


def is_own(error: Exception, connection: NodeConnection) -> bool:
    """Return whether what work has raised is its own, and not the failure of its node.

    That goes by what has become of the connection: the SQLSTATE of a node that fails may as well come from a
    function of the application, an extension or a foreign server.
    """
    if isinstance(error, asyncpg.PostgresError):
        if error.severity_en in _CONNECTION_ENDED:
            return False
        return not (is_lost(connection) and speaks_against_node(error))
    if isinstance(error, _MAYBE_OWN):
        return answers(connection)
    if isinstance(error, asyncpg.InterfaceError | AttributeError):
        return not is_lost(connection)
    return not isinstance(error, asyncpg.InternalClientError | NodeChanged)


_MAYBE_OWN = (OSError, TimeoutError)
"""What work may raise by itself, and asyncpg as well where a node fails."""

_CONNECTION_ENDED = ("FATAL", "PANIC")
"""Severities after which the server ends the connection."""


async def _bound_after_error(connection: NodeConnection) -> ReadBound | None:
    """Ask a node after an error of work; return None if it cannot be asked on this connection.

    Raise what speaks against the node, of which nothing is known then.
    """
    if not answers(connection) or not (connection.direct or connection.is_in_transaction()):
        return None
    try:
        async with asyncio.timeout(LOOK_S):
            return await ask_bound(connection)
    except asyncpg.PostgresConnectionError:
        raise
    except (asyncpg.PostgresError, asyncpg.InterfaceError):  # an aborted transaction, a statement under way
        return None


def _reported(connection: NodeConnection) -> str | None:
    """Return the bound that came with the last statement on a connection, if it was reported."""
    reported = connection.reported
    return None if reported is None or reported[1] != connection.statements else reported[0]


async def ask_bound(connection: Connection) -> ReadBound:
    """Ask a node for the bound of what was read on this connection so far."""
    bound = ReadBound.parse(str(await connection.fetchval(_ASK)))
    return bound if bound.timeline else await _with_epoch(connection, bound)


async def _with_epoch(connection: Connection, bound: ReadBound) -> ReadBound:
    """Add the newest epoch's row, which says what a replica that does not stream follows.

    It may be asked for afterwards: a replica never goes back. Raise `EpochChanged` where work has set a role or a
    `search_path` that hides the row: another node has to answer then.
    """
    try:
        epoch: str | None = await connection.fetchval(_NEWEST_EPOCH)
    except (asyncpg.UndefinedTableError, asyncpg.InsufficientPrivilegeError) as error:
        raise EpochChanged(f"which epoch it shows is hidden by what work has set: {error}") from error
    return dataclasses.replace(bound, epoch=None if epoch is None else Epoch(epoch))

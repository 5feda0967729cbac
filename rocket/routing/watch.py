"""One node under observation: its connection, the status query, and what the board gets to know of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias

import asyncpg

from rocket.consistency import Epoch, Lsn, PrimaryStatus, ReplicaStatus, timeline_of
from rocket.errors import describe
from rocket.routing import connection as connections
from rocket.routing import heartbeat, opening
from rocket.routing.connection import SERVER_STARTED
from rocket.routing.epochs import (
    NEWEST_SHOWN,
    abandon_epoch,
    begin_epoch_anew,
    have_timelines_noted,
    read_known_primary_state,
    read_primary_state,
)
from rocket.routing.failures import ENDED, REFUSED, AddressUnusable, NotAsObserved, UnfitPooler, connecting

if TYPE_CHECKING:
    from asyncpg import Record

    from rocket.consistency import Board, Incarnation
    from rocket.dsn import Node
    from rocket.routing.connection import NodeConnection
    from rocket.routing.epochs import PrimaryState

_ANSWER_TIMEOUT_S = 1.0
"""A node that takes longer to answer the status query is out of reach."""
_BEAT_TIMEOUT_S = 4.0
"""So is one that takes longer for all that it is asked and that is written there, once there is a connection."""

_WHY_CHECKED = {
    True: "hides its startup process: each read there checks by itself, in a transaction, and asks the primary "
    "what it may have shown (GRANT pg_monitor to rocket's role, or pg_read_all_stats, spares that)",
    False: "is behind a connection pooler: whatever is done there checks by itself, in a transaction, where it is "
    "(the server's own address spares that)",
}
"""Logged once where no status can vouch for a connection, by whether the connection is to the server itself."""

_NOTED_AGAIN_S = 15.0
"""How often replicas that do not prove their epoch are made to note their timeline once more."""

_LATELY_S = 2.0
"""A primary that was not seen for longer has to be confirmed again: there may have been another one meanwhile."""

MayBePrimary: TypeAlias = Callable[[str], Awaitable[bool]]
"""Returns whether a node, given by name, may be the primary as far as a cluster manager knows."""

Connect: TypeAlias = "Callable[[Node], Awaitable[NodeConnection]]"
"""Opens a connection to a node."""

_EPOCH_COLUMN = f"{NEWEST_SHOWN} AS epoch"
STATUS_QUERY = f"""
    SELECT now.in_recovery, now.replay_lsn, now.receive_lsn,
           (SELECT CASE WHEN status = 'streaming' THEN received_tli END FROM pg_stat_wal_receiver
           ) AS streamed_timeline,
           (SELECT pid IS NOT NULL AND status IS NULL FROM pg_stat_wal_receiver) AS receiver_is_hidden,
           {_EPOCH_COLUMN},
           (SELECT pid FROM pg_stat_wal_receiver) AS receiver,
           (SELECT min_recovery_end_timeline FROM pg_control_recovery()) AS applied_timeline,
           (SELECT system_identifier FROM pg_control_system()) AS system_id,
           {SERVER_STARTED} AS started,
           (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS clock
      FROM (SELECT pg_is_in_recovery() AS in_recovery,
                   pg_last_wal_replay_lsn() AS replay_lsn,
                   pg_last_wal_receive_lsn() AS receive_lsn
            OFFSET 0) AS now
"""  # noqa: S608 - our own text
"""The positions come first: a timeline that is streamed after they were read is, at the earliest, theirs."""

_HOLDER = """(
    SELECT pid FROM pg_locks
     WHERE locktype = 'relation' AND relation IN (to_regclass('epochs'), to_regclass('covers'))
       AND mode = 'AccessExclusiveLock'
     ORDER BY granted DESC LIMIT 1
)"""
_IF_LOCKED = STATUS_QUERY.replace(
    _EPOCH_COLUMN,
    f"$1::text AS epoch, {_HOLDER} AS locked_by",
)
"""The same without the table `epochs`, if it or `covers` is locked: a statement that names it would wait.

The epoch is what it was when it was last read on the same connection, and so from the same server. A replica that
has the same WAL receiver ever since follows the same run of the same primary.
"""

_ENTERED_NO_LATER = r"""
    SELECT NOT EXISTS (SELECT FROM pg_ls_waldir()
                        WHERE name ~ '^[0-9A-F]{8}\.history$' AND ('x' || left(name, 8))::bit(32)::int > $1)
"""
"""Whether a replica has no history file of a later timeline: without it, it has entered none."""

_SYSTEM_ID = "SELECT system_identifier FROM pg_control_system()"

_log = logging.getLogger("rocket.observer")


def replica_status_from(name: str, row: Record, incarnation: Incarnation | None, asked_at: float) -> ReplicaStatus:
    """Return the status that a row of `STATUS_QUERY` gives; raise `NotAsObserved` if the node replays nothing.

    To a role that may not know the incarnation the server does not say what is streamed either, but that something
    is.
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
        system_id=row["system_id"],
    )


class NodeWatch:
    """Owns the observing connection to one node, and publishes the node's status on the board."""

    def __init__(
        self,
        name: str,
        node: Node,
        board: Board,
        beat_s: float,
        *,
        may_be_primary: MayBePrimary | None = None,
        roles_only: bool = False,
        record_statuses: bool = False,
        takes_reads: bool = True,
        connect: Connect = opening.connect,
    ) -> None:
        self.name = name
        self._node = node
        self._board = board
        self._beat_s = beat_s
        self._may_be_primary = may_be_primary
        self._roles_only = roles_only
        self._record_statuses = record_statuses
        self._takes_reads = takes_reads
        self._open = connect
        self._connection: NodeConnection | None = None
        self._streamed: tuple[Epoch, Lsn] | None = None
        self._elected = False
        self._to_be_noted = False
        self._noted_at = time.monotonic()
        self._noted_lsn = Lsn(0)
        self._logged_why_checked = False
        self._writes = _StateLog(f"writing on {name}")
        self._state = _StateLog(name)
        self._behind = opening.ServersBehind()
        self._read: tuple[NodeConnection, Record] | None = None
        self._state_read: tuple[NodeConnection, PrimaryState] | None = None
        self._is_locked = False
        self._is_outdated = False
        self.has_lost_connection = False  # when it was last tried: a new one may do at once
        self.failure: Exception | None = None
        """What kept the node from being observed when that was last tried; None if nothing did."""

    @property
    def state(self) -> str:
        """What the node was when it last answered, as the log says it; empty before its first answer."""
        return self._state.last

    async def observe(self, within_s: float | None = None) -> bool:
        """Publish the node's status, or remove it if it gives none; return whether it answered as a replica."""
        try:
            with opening.untraced():
                async with asyncio.timeout(within_s):
                    is_replica = await (self._observe_as_writer() if self._elected else self._observe())
        except Exception as error:  # noqa: BLE001 - one node never ends the observation of the others
            self.failure = error
            self._board.forget(self.name)
            if isinstance(error, UnfitPooler):
                self._board.refused[self.name] = str(error)
                self._state.refused("refused", str(error))
            else:
                self._state.lost(error)
            self.has_lost_connection = self._connection is not None
            self.close()
            return False
        self.failure, self.has_lost_connection = None, False
        return is_replica

    def connect_anew(self, since: float) -> None:
        """Have the next question be asked over a new connection, unless this one was opened after `since`."""
        if self._connection is not None and self._connection.opened_at < since and not self._is_outdated:
            _log.warning("%s leads to another server than was observed: it is observed anew", self.name)
            self._is_outdated = True

    async def find_system(self, within_s: float) -> int | None:
        """Return the system identifier of the cluster that the node belongs to; None if it gives none."""
        try:
            with opening.untraced():
                async with asyncio.timeout(within_s):
                    self._connection = self._connection or await self._connect()
                    return await self._connection.fetchval(_SYSTEM_ID, timeout=_ANSWER_TIMEOUT_S)  # type: ignore[no-any-return]
        except Exception:  # noqa: BLE001 - `observe` finds the same, and says so
            self.close()
            return None

    async def _observe(self) -> bool:
        if self._connection is None or self._connection.is_closed() or self._is_outdated:
            self._is_outdated = False
            if self._connection is not None:
                # What was known belongs to a connection, and so perhaps to an incarnation, that has ended.
                self.close()
                self._board.forget(self.name)
            self._connection = await self._connect()
        return await self._ask(self._connection)

    async def _connect(self) -> NodeConnection:
        with connecting():
            return await self._open(self._node)

    async def _observe_as_writer(self) -> bool:
        """Do the same on the writer's connection, which its server ends after a silence: then connect anew."""
        assert self._connection is not None  # noqa: S101 - it is the one that was elected
        if self._is_outdated:
            return await self._observe()
        try:
            return await self._ask(self._connection)
        except ENDED:
            self.close()
            self._connection = await self._connect()
            return await self._ask(self._connection)

    async def _ask(self, connection: NodeConnection) -> bool:
        async with asyncio.timeout(_BEAT_TIMEOUT_S):
            asked_at = time.monotonic()
            row = await self._ask_status(connection)
            if not connection.direct:
                self._behind.check(row)
            if row["in_recovery"]:
                await self._publish_replica(connection, row, asked_at)
            else:
                await self._publish_primary(connection)
            return bool(row["in_recovery"])

    async def _ask_status(self, connection: NodeConnection) -> Record:
        """Ask for the status: without the table `epochs` while it is locked, where the epoch is known already."""
        read = self._read if self._read is not None and self._read[0] is connection else None
        if not self._is_locked or read is None:
            self._is_locked = False
            try:
                async with _in_one_piece(connection):
                    row = await connection.fetchrow(STATUS_QUERY, timeout=_ANSWER_TIMEOUT_S)
            except TimeoutError:
                if not connection.direct:
                    raise
                if read is None:
                    holder = await connection.fetchval(f"SELECT {_HOLDER}", timeout=_ANSWER_TIMEOUT_S)
                    if holder is None:
                        raise
                    raise NotAsObserved(
                        f"a table of rocket's is locked, by process {holder} there, and was not read before"
                    ) from None
            else:
                assert row is not None  # noqa: S101 - it has no WHERE
                self._read = (connection, row)
                return row
        assert read is not None  # noqa: S101 - else it was raised above
        row = await connection.fetchrow(_IF_LOCKED, read[1]["epoch"], timeout=_ANSWER_TIMEOUT_S)
        assert row is not None  # noqa: S101 - it has no WHERE
        if row["locked_by"] is None:
            self._is_locked = False
            return await self._ask_status(connection)
        if not self._is_locked:
            _log.warning(
                "a table of rocket's is locked on %s, by process %s there (on a replica, by one of its primary's)",
                self.name, row["locked_by"],
            )  # fmt: skip
        self._is_locked = True
        if row["in_recovery"] and (row["receiver"] is None or row["receiver"] != read[1]["receiver"]):
            raise NotAsObserved(
                f"a table of rocket's is locked, by process {row['locked_by']} there, and its WAL receiver is "
                "new: which primary it follows is unknown"
            )
        return row

    async def _publish_replica(self, connection: NodeConnection, row: Record, asked_at: float) -> None:
        status = replica_status_from(self.name, row, connection.incarnation, asked_at)
        epoch = status.epoch
        if (
            epoch is not None
            and status.incarnation is not None
            and (status.streaming or (self._streamed is None and await self._has_stayed_in(epoch, connection)))
        ):
            self._streamed = (epoch, status.replay_lsn)
        if self._streamed is not None and self._streamed[0] == status.epoch:
            status = dataclasses.replace(status, streamed_lsn=self._streamed[1])
        if self._roles_only or not self._takes_reads:
            self._board.forget(self.name)
        elif not self._board.publish(status):
            self._state.refused("of another cluster", self._board.refused[self.name])
            return
        self._state.found("a replica", f"replay LSN {status.replay_lsn}")
        if status.incarnation is None:
            self._log_why_checked(connection)

    async def _has_stayed_in(self, epoch: Epoch, connection: NodeConnection) -> bool:
        """Return whether all that a replica has replayed is WAL of an epoch that it was not seen streaming."""
        timeline = timeline_of(epoch)
        try:
            return bool(await connection.fetchval(_ENTERED_NO_LATER, timeline, timeout=_ANSWER_TIMEOUT_S))
        except asyncpg.InsufficientPrivilegeError:
            return False

    def _log_why_checked(self, connection: NodeConnection) -> None:
        if not self._logged_why_checked and (connection.to_replica or not connection.direct):
            _log.warning("%s %s", self.name, _WHY_CHECKED[connection.direct])
            self._logged_why_checked = True

    async def _publish_primary(self, connection: NodeConnection) -> None:
        if connection.to_replica and connection.direct:
            # It is read-only. What the board says is over at once.
            self._board.forget(self.name)
            self.close()
            connection = self._connection = await self._connect()
        if not await self._is_accepted():
            self._board.forget(self.name)
            self._state.found("not accepted as primary", "the cluster manager names another primary, or none")
            return
        status = await self._ask_primary(connection)
        if self._board.has_lost(status):
            _log.error(
                "%s lacks WAL that was written in epoch %s: its flush LSN is %s. A new epoch begins, and "
                "sessions of the earlier one are told that their writes may be lost",
                self.name, status.epoch, status.flush_lsn,
            )  # fmt: skip
            async with _in_one_piece(connection, read_only=False):
                await begin_epoch_anew(connection, status.epoch, self._board.origins.newest)
            self._to_be_noted = True
            status = await self._ask_primary(connection)
        if not self._board.publish_primary(status):
            self._state.refused("not accepted as primary", self._board.refused[self.name])
            return
        self._state.found("the primary", f"epoch {status.epoch}, flush LSN {status.flush_lsn}")
        self._log_why_checked(connection)
        try:
            await self._record(connection)
        except REFUSED as error:  # no routing depends on it
            self._writes.lost(error)
        else:
            self._writes.found("possible", status.name)

    async def _ask_primary(self, connection: NodeConnection) -> PrimaryStatus:
        asked_at = time.monotonic()
        if self._is_locked:
            state = await self._ask_known_primary(connection)
        else:
            try:
                async with _in_one_piece(connection, read_only=False):
                    state = await read_primary_state(connection, _ANSWER_TIMEOUT_S)
            except TimeoutError:
                if not connection.direct:
                    raise
                self._is_locked = True  # no cover is stored meanwhile; and if it is not, that is found out at once
                state = await self._ask_known_primary(connection)
            else:
                self._state_read = (connection, state)
        self._to_be_noted |= state.is_new
        return PrimaryStatus(
            self.name,
            state.flush_lsn,
            asked_at,
            state.epoch,
            system_id=state.system_id,
            started=state.started,
            checkpoint_lsn=state.checkpoint_lsn,
            restarted=state.restarted,
            read_only=state.read_only,
            covered_lsn=state.covered_lsn,
        )

    async def _ask_known_primary(self, connection: NodeConnection) -> PrimaryState:
        """Ask a primary whose epoch was read on the same connection, before a table was locked."""
        if self._state_read is None or self._state_read[0] is not connection:
            raise NotAsObserved("its epoch is unknown: a table of rocket's is locked there")
        known = self._state_read[1]
        return await read_known_primary_state(connection, known.epoch, restarted=known.restarted)

    async def _is_accepted(self) -> bool:
        """Return whether it was the current primary lately, or else whether the cluster manager accepts it."""
        primary = self._board.current_primary(time.monotonic(), _LATELY_S)
        if self._may_be_primary is None or (primary is not None and primary.name == self.name):
            return True
        return await self._may_be_primary(self.name)

    async def _record(self, connection: NodeConnection) -> None:
        """Have timelines noted, and beat: without either, reads are slower, not wrong."""
        for epoch in list(self._board.abandoned):
            async with _in_one_piece(connection, read_only=False):
                await abandon_epoch(connection, epoch)
            self._board.abandoned.discard(epoch)
        if self._to_be_noted or self._is_to_be_noted_again():
            self._noted_at = time.monotonic()
            self._noted_lsn = await have_timelines_noted(connection)
            self._to_be_noted = False
        if not self._roles_only:
            await self._beat(connection)

    def _is_to_be_noted_again(self) -> bool:
        """Return whether replicas do not prove their epoch, as if the observer that named it had died early.

        One that has yet to replay what they were made to note last needs no more: each time leaves dead rows.
        """
        return (
            self._elected
            and time.monotonic() - self._noted_at > _NOTED_AGAIN_S
            and any(s.epoch is None and s.replay_lsn >= self._noted_lsn for s in self._board.replicas)
        )

    async def _beat(self, connection: NodeConnection) -> None:
        """Beat if elected: through a pooler for one beat at a time, since the session there is not ours."""
        lock = heartbeat.WRITERS_LOCK if self._record_statuses else heartbeat.BEAT_LOCK
        async with _in_one_piece(connection, read_only=False):
            if not connection.direct:
                is_elected = await heartbeat.elect_for_now(connection, lock)
            else:
                is_elected = self._elected = self._elected or await heartbeat.elect(connection, lock, self._beat_s)
            if is_elected and self._record_statuses:
                await heartbeat.record(connection, self._board.replicas)
            elif is_elected:
                await heartbeat.beat(connection)

    def close(self) -> None:
        """Drop the connection, and with it the right to beat."""
        self._elected = False
        self._streamed = None
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


class _StateLog:
    """Logs once, not at every beat, that a node is lost or found again, or has another role."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.last = ""
        self._is_lost = False

    def found(self, state: str, detail: object) -> None:
        if self.last and (self._is_lost or state != self.last):  # the first state is no news
            _log.info("%s is %s: %s", self._name, state, detail)
        self.last = state
        self._is_lost = False

    def refused(self, state: str, why: str) -> None:
        """Log that a node is left alone: loudly, and the first state, too."""
        if state != self.last:
            _log.error("%s is left alone: %s", self._name, why)
        self.last = state
        self._is_lost = False

    def lost(self, why: Exception) -> None:
        if not self._is_lost:
            expected = isinstance(why, (AddressUnusable, NotAsObserved, *REFUSED))
            _log.warning("%s is out of reach: %s", self._name, describe(why), exc_info=None if expected else why)
        self._is_lost = True


def _in_one_piece(
    connection: NodeConnection, *, read_only: bool = True
) -> contextlib.AbstractAsyncContextManager[None]:
    """Have one server answer the body's statements, where a pooler might spread them."""
    if connection.direct:
        return contextlib.nullcontext()
    return connections.in_one_piece(connection, read_only=read_only)

"""The observer: asks every node again and again what and where it is, and puts the answers on the board."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias

from rocket.consistency import PrimaryStatus
from rocket.errors import describe
from rocket.routing import connection as connections
from rocket.routing import heartbeat
from rocket.routing.admittance import AddressUnusable, connecting
from rocket.routing.catchup import Waiting
from rocket.routing.epochs import have_timelines_noted, read_primary_state
from rocket.routing.failures import ENDED, REFUSED, NotAsObserved
from rocket.routing.looking import STATUS_QUERY, replica_status_from

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncpg import Record

    from rocket.consistency import Board, Epoch, Lsn
    from rocket.routing.connection import NodeConnection

_ANSWER_TIMEOUT_S = 1.0
"""A node that takes longer to say where it is, is out of reach."""

_WHY_CHECKED = {
    True: "hides its startup process: each read there checks by itself, in a transaction, and asks the primary "
    "what it may have shown (GRANT pg_monitor to rocket's role, or pg_read_all_stats, spares that)",
    False: "is behind a connection pooler: whatever is done there checks by itself, in a transaction, where it is "
    "(the server's own address spares that)",
}
"""Said once where no status can vouch for a connection, by whether the connection is to the server itself."""

_NOTED_AGAIN_S = 15.0
"""How often replicas that do not prove their reign are made to note their timeline once more."""

_LATELY_S = 2.0
"""A primary that was not seen for longer comes back into office: another may have been there meanwhile."""

MayBePrimary: TypeAlias = Callable[[str], Awaitable[bool]]
"""Tells whether a node, by its name, may come into office as far as somebody else knows."""

Connect: TypeAlias = "Callable[[str], Awaitable[NodeConnection]]"
"""Opens a connection to the node at a DSN."""

_log = logging.getLogger("rocket.observer")


def _whole(connection: NodeConnection, *, read_only: bool = True) -> contextlib.AbstractAsyncContextManager[None]:
    """Have the body's statements answered by one server, where that is not so anyway."""
    if connection.direct:
        return contextlib.nullcontext()
    return connections.in_one_piece(connection, read_only=read_only)


class _Reach:
    """Says once, not at every beat, that a node is lost or found again, or has another role."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._known = ""
        self._lost = False

    def found(self, what: str, detail: object) -> bool:
        """Tell whether that is news."""
        news = self._lost or what != self._known
        if news and self._known:  # the beginning is no news to anybody
            _log.info("%s is %s: %s", self.name, what, detail)
        self._known = what
        self._lost = False
        return news

    def lost(self, why: Exception) -> None:
        if not self._lost:
            foreseen = isinstance(why, (AddressUnusable, NotAsObserved, *REFUSED))
            _log.warning("%s is out of reach: %s", self.name, describe(why), exc_info=None if foreseen else why)
        self._lost = True


class NodeWatch:
    """Owns the observing connection to one node, and what the board says of it."""

    def __init__(
        self,
        name: str,
        dsn: str,
        board: Board,
        beat_s: float,
        may_be_primary: MayBePrimary,
        *,
        roles_only: bool = False,
        takes_reads: bool = True,
        connect: Connect = connections.connect,
    ) -> None:
        self.name = name
        self._dsn = dsn
        self._board = board
        self._beat_s = beat_s
        self._may_lead = may_be_primary
        self._roles_only = roles_only
        self._takes_reads = takes_reads
        self._open = connect
        self._connection: NodeConnection | None = None
        self._streamed: tuple[Epoch, Lsn] | None = None
        self._elected = False
        self._to_be_noted = False
        self._noted_at = time.monotonic()
        self._said_why_checked = False
        self._writes = _Reach(f"writing on {name}")
        self._reach = _Reach(name)
        self.failure: Exception | None = None
        """What kept the node from being observed when that was last tried; None if nothing did."""

    async def observe(self) -> bool:
        """Publish the node's status, or take it away if it gives none; tell whether it answered as a replica."""
        try:
            async with asyncio.timeout(connections.CONNECT_TIMEOUT_S + _ANSWER_TIMEOUT_S):
                is_replica = await (self._observe_as_writer() if self._elected else self._observe())
        except Exception as error:  # noqa: BLE001 - one node never ends the observation of the others
            self.failure = error
            self._board.forget(self.name)
            self._reach.lost(error)
            self.close()
            return False
        self.failure = None
        return is_replica

    async def _observe(self) -> bool:
        if self._connection is None or self._connection.is_closed():
            if self._connection is not None:
                # Whatever was known belongs to a connection, and so perhaps to an incarnation, that has ended.
                self.close()
                self._board.forget(self.name)
            self._connection = await self._connect()
        return await self._look(self._connection)

    async def _connect(self) -> NodeConnection:
        with connecting():
            return await self._open(self._dsn)

    async def _observe_as_writer(self) -> bool:
        """Do the same on a connection that its server ends if it falls silent, and is none the worse for it."""
        assert self._connection is not None  # noqa: S101 - it is the one that was elected
        try:
            return await self._look(self._connection)
        except ENDED:
            self.close()
            self._connection = await self._connect()
            return await self._look(self._connection)

    async def _look(self, connection: NodeConnection) -> bool:
        asked_at = time.monotonic()
        async with _whole(connection):
            row = await connection.fetchrow(STATUS_QUERY, timeout=_ANSWER_TIMEOUT_S)
        assert row is not None  # noqa: S101 - it has no WHERE
        if not row["in_recovery"]:
            await self._publish_primary(connection)
            return False
        self._publish_replica(connection, row, asked_at)
        return True

    def _publish_replica(self, connection: NodeConnection, row: Record, asked_at: float) -> None:
        status = replica_status_from(self.name, row, connection.incarnation, asked_at)
        if status.epoch is not None and status.streaming and status.incarnation is not None:
            self._streamed = (status.epoch, status.replay_lsn)
        if self._streamed is not None and self._streamed[0] == status.epoch:
            status = dataclasses.replace(status, streamed_lsn=self._streamed[1])
        if self._roles_only or not self._takes_reads:
            self._board.forget(self.name)
        else:
            self._board.publish(status)
        self._reach.found("a replica", f"replay LSN {status.replay_lsn}")
        if status.incarnation is None:
            self._say_why_checked(connection)

    def _say_why_checked(self, connection: NodeConnection) -> None:
        if not self._said_why_checked and (connection.to_replica or not connection.direct):
            _log.warning("%s %s", self.name, _WHY_CHECKED[connection.direct])
            self._said_why_checked = True

    async def _publish_primary(self, connection: NodeConnection) -> None:
        if connection.to_replica and connection.direct:
            # It is read-only. What the board said is over at once.
            self._board.forget(self.name)
            self.close()
            connection = self._connection = await self._connect()
        if not (self._is_in_office() or await self._may_lead(self.name)):
            self._board.forget(self.name)
            self._reach.found("no primary to follow", "whoever runs the cluster knows of another, or of none")
            return
        asked_at = time.monotonic()
        async with _whole(connection, read_only=False):
            reign = await read_primary_state(connection)
        status = PrimaryStatus(self.name, reign.flush_lsn, asked_at, reign.epoch)
        if not self._board.publish_primary(status):
            self._reach.found("no primary to follow", f"epoch {reign.epoch} is over, or a copy; it takes nothing")
            return
        self._reach.found("the primary", f"epoch {reign.epoch}, flush LSN {reign.flush_lsn}")
        self._say_why_checked(connection)
        self._to_be_noted |= reign.is_new
        try:
            await self._write_down(connection)
        except REFUSED as error:  # nobody's routing depends on it
            self._writes.lost(error)
        else:
            self._writes.found("possible", status.name)

    def _is_in_office(self) -> bool:
        """Tell whether it is the primary that was seen in office lately."""
        primary = self._board.current_primary(time.monotonic(), _LATELY_S)
        return primary is not None and primary.name == self.name

    async def _write_down(self, connection: NodeConnection) -> None:
        """Write what others may want to know: slower without, and not wrong."""
        if not self._roles_only:
            if connection.direct:
                self._elected = self._elected or await heartbeat.elect(connection, self._beat_s)
                if self._elected:
                    await heartbeat.record(connection, self._board.replicas)
            else:
                await self._record_through_pooler(connection)
        if self._to_be_noted or self._is_to_be_noted_again():
            self._noted_at = time.monotonic()
            await have_timelines_noted(connection)
            self._to_be_noted = False

    def _is_to_be_noted_again(self) -> bool:
        """Tell whether replicas do not prove their reign, as if who named it had died before it was noted."""
        return (
            self._elected
            and time.monotonic() - self._noted_at > _NOTED_AGAIN_S
            and any(status.epoch is None for status in self._board.replicas)
        )

    async def _record_through_pooler(self, connection: NodeConnection) -> None:
        """Be elected for one beat at a time: a session there is not ours to keep a lock in."""
        async with connections.in_one_piece(connection, read_only=False):
            if await heartbeat.elect_for_now(connection):
                await heartbeat.record(connection, self._board.replicas)

    def close(self) -> None:
        """Drop the connection, and with it the right to write the table."""
        self._elected = False
        self._streamed = None
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


class Observer:
    """Keeps a board up to date: one watch for each node, each with a beat of its own.

    With `roles_only` it finds out who the primary is, and says nothing of replicas.
    """

    def __init__(
        self,
        nodes: Mapping[str, str],
        board: Board,
        *,
        interval_s: float,
        roles_only: bool = False,
        connect: Connect = connections.connect,
    ) -> None:
        self.waiting = Waiting()
        """Brings what it sees to those who wait for it."""
        self.board = board
        self.may_be_primary: MayBePrimary | None = None
        """Asked of a node that would come into office, or back: a veto, where somebody else knows better."""
        self._interval_s = interval_s
        self._roles_only = roles_only
        self._connect = connect
        self._watches: dict[str, NodeWatch] = {}
        self._group: asyncio.TaskGroup | None = None
        """Where the watches are at work, while they are."""
        self._at_work: dict[str, asyncio.Task[None]] = {}
        for name, dsn in nodes.items():
            self.add(name, dsn)

    def add(self, name: str, dsn: str, *, takes_reads: bool = True) -> None:
        """Watch one more node, or one that is watched at another address from now on.

        One that takes no reads takes none as a replica.
        """
        if name in self._watches:
            self._let_go(name)
        self._watches[name] = NodeWatch(
            name, dsn, self.board, self._interval_s, self._ask,
            roles_only=self._roles_only, takes_reads=takes_reads, connect=self._connect,
        )  # fmt: skip
        if self._group is not None:
            self._set_to_work(self._group, self._watches[name])

    async def _ask(self, name: str) -> bool:
        return self.may_be_primary is None or await self.may_be_primary(name)

    def remove(self, name: str) -> None:
        """Watch a node no more, and know nothing of it; raise `KeyError` if there is none of that name."""
        self._let_go(name)
        self.board.forget(name)

    def _let_go(self, name: str) -> None:
        watch = self._watches.pop(name)
        if (task := self._at_work.pop(name, None)) is not None:
            task.cancel()
        watch.close()

    def _set_to_work(self, group: asyncio.TaskGroup, watch: NodeWatch) -> None:
        self._at_work[watch.name] = group.create_task(self._keep_watching(watch), name=f"watch {watch.name}")

    async def run(self) -> None:
        """Observe until cancelled. A node out of reach holds up no other, and never ends it."""
        try:
            async with asyncio.TaskGroup() as self._group:
                for watch in self._watches.values():
                    self._set_to_work(self._group, watch)
                await asyncio.Event().wait()  # though there be no node: some may come
        finally:
            self._group = None
            self._at_work.clear()
            self.close()

    async def run_once(self) -> None:
        """Observe every node once, all at the same time, and then the primary again: it knows most last."""
        if self.board.primary is None:
            # Its reign has a name before replicas are asked for it.
            await asyncio.gather(*(watch.observe() for watch in self._watches.values()))
        await asyncio.gather(*(watch.observe() for watch in self._watches.values()))
        if self.board.primary is not None and self.board.primary.name in self._watches:
            await self._watches[self.board.primary.name].observe()

    @property
    def failures(self) -> Mapping[str, Exception]:
        """What kept nodes from being observed when they were last asked, by name."""
        return {name: watch.failure for name, watch in self._watches.items() if watch.failure is not None}

    def close(self) -> None:
        """Drop every connection."""
        for watch in self._watches.values():
            watch.close()

    async def _keep_watching(self, watch: NodeWatch) -> None:
        while True:
            if await watch.observe():
                self.waiting.bring_news()
                await self.waiting.pause(watch.name, self._interval_s)
            else:
                await asyncio.sleep(self._interval_s)

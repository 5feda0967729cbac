"""The observer: asks every node again and again what and where it is, and puts the answers on the board."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from rocket.consistency import Epoch, Lsn, PrimaryStatus, ReplicaStatus, timeline_of
from rocket.errors import in_words
from rocket.routing import connections, status_table
from rocket.routing.epochs import have_timelines_noted, reign_of
from rocket.routing.failures import REFUSED, NotAsObserved
from rocket.routing.waiting import Waiting

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncpg import Record

    from rocket.consistency import Board
    from rocket.routing.connections import NodeConnection

_ANSWER_TIMEOUT_S = 1.0
"""A node that takes longer to say where it is, is out of reach."""

_STATUS = """
    SELECT now.in_recovery, now.replay_lsn, now.receive_lsn,
           (SELECT received_tli FROM pg_stat_wal_receiver WHERE status = 'streaming') AS streamed_timeline,
           (SELECT epoch FROM epochs ORDER BY timeline DESC LIMIT 1) AS epoch,
           (SELECT min_recovery_end_timeline FROM pg_control_recovery()) AS applied_timeline
      FROM (SELECT pg_is_in_recovery() AS in_recovery,
                   pg_last_wal_replay_lsn() AS replay_lsn,
                   pg_last_wal_receive_lsn() AS receive_lsn
            OFFSET 0) AS now
"""
"""The positions come first: a timeline that is streamed after they were read is, at the earliest, theirs."""

_log = logging.getLogger("rocket.observer")


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
            foreseen = isinstance(why, (NotAsObserved, *REFUSED))
            _log.warning("%s is out of reach: %s", self.name, in_words(why), exc_info=None if foreseen else why)
        self._lost = True


class NodeWatch:
    """Owns the observing connection to one node, and what the board says of it."""

    def __init__(self, name: str, dsn: str, board: Board, *, roles_only: bool = False) -> None:
        self.name = name
        self._dsn = dsn
        self._board = board
        self._roles_only = roles_only
        self._connection: NodeConnection | None = None
        self._streamed: tuple[Epoch, Lsn] | None = None
        self._elected = False
        self._to_be_noted = False
        self._writes = _Reach(f"writing on {name}")
        self._reach = _Reach(name)
        self.failure: Exception | None = None
        """What kept the node from being observed when that was last tried; None if nothing did."""

    async def observe(self) -> bool:
        """Publish the node's status, or take it away if it gives none; tell whether it answered as a replica."""
        try:
            async with asyncio.timeout(connections.CONNECT_TIMEOUT_S + _ANSWER_TIMEOUT_S):
                is_replica = await self._observe()
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
            # Whatever was known belongs to a connection, and so perhaps to an incarnation, that has ended.
            self.close()
            self._board.forget(self.name)
            self._connection = await connections.connect(self._dsn)
        asked_at = time.monotonic()
        row = await self._connection.fetchrow(_STATUS, timeout=_ANSWER_TIMEOUT_S)
        assert row is not None  # noqa: S101 - it has no WHERE
        if not row["in_recovery"]:
            await self._publish_primary(self._connection)
            return False
        self._publish_replica(self._connection, row, asked_at)
        return True

    def _publish_replica(self, connection: NodeConnection, row: Record, asked_at: float) -> None:
        if row["replay_lsn"] is None:
            raise NotAsObserved("it replays nothing")
        shows = None if row["epoch"] is None else Epoch(row["epoch"])
        # The row alone is no proof: see `epochs`.
        epoch = None if shows is None or row["applied_timeline"] != timeline_of(shows) else shows
        replay_lsn = Lsn.from_wire(row["replay_lsn"])
        receive_lsn = None if row["receive_lsn"] is None else Lsn.from_wire(row["receive_lsn"])
        streaming = epoch is not None and row["streamed_timeline"] == timeline_of(epoch)
        if epoch is not None and streaming:
            self._streamed = (epoch, replay_lsn)
        status = ReplicaStatus(
            name=self.name,
            replay_lsn=replay_lsn,
            incarnation=connection.incarnation,
            observed_at=asked_at,
            answered_at=time.monotonic(),
            receive_lsn=receive_lsn,
            streaming=streaming,
            streamed_lsn=self._streamed[1] if self._streamed is not None and self._streamed[0] == epoch else None,
            epoch=epoch,
        )
        if self._roles_only:
            self._board.forget(self.name)
        else:
            self._board.publish(status)
        if self._reach.found("a replica", f"replay LSN {status.replay_lsn}") and status.incarnation is None:
            _log.warning(
                "%s hides its startup process (needs pg_read_all_stats, without a pooler in between): "
                "it will not be read from",
                self.name,
            )

    async def _publish_primary(self, connection: NodeConnection) -> None:
        if connection.incarnation is not None:
            # It was opened to a replica, and is read-only. What the board said is over at once.
            self._board.forget(self.name)
            self.close()
            connection = self._connection = await connections.connect(self._dsn)
        asked_at = time.monotonic()
        reign = await reign_of(connection)
        status = PrimaryStatus(self.name, reign.flush_lsn, asked_at, reign.epoch)
        if not self._board.publish_primary(status):
            self._reach.found("no primary to follow", f"epoch {reign.epoch} is over, or a copy; it takes nothing")
            return
        self._reach.found("the primary", f"epoch {reign.epoch}, flush LSN {reign.flush_lsn}")
        self._to_be_noted |= reign.is_new
        try:
            await self._write_down(connection)
        except REFUSED as error:  # nobody's routing depends on it
            self._writes.lost(error)
        else:
            self._writes.found("possible", status.name)

    async def _write_down(self, connection: NodeConnection) -> None:
        """Write what others may want to know: slower without, and not wrong."""
        if self._to_be_noted:
            await have_timelines_noted(connection)
            self._to_be_noted = False
        if not self._roles_only:
            self._elected = self._elected or await status_table.elect(connection)
            if self._elected:
                await status_table.record(connection, self._board.replicas)

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
        self, nodes: Mapping[str, str], board: Board, *, interval_s: float, roles_only: bool = False
    ) -> None:
        self.waiting = Waiting()
        """Brings what it sees to those who wait for it."""
        self.board = board
        self._interval_s = interval_s
        self._watches = {name: NodeWatch(name, dsn, board, roles_only=roles_only) for name, dsn in nodes.items()}

    async def run(self) -> None:
        """Observe until cancelled. A node out of reach holds up no other, and never ends it."""
        try:
            async with asyncio.TaskGroup() as group:
                for watch in self._watches.values():
                    group.create_task(self._keep_watching(watch), name=f"watch {watch.name}")
        finally:
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

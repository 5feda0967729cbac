"""The observer: asks every node again and again where it is, and puts the answers on the board."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

import asyncpg

from rocket.consistency import Epoch, Lsn, PrimaryStatus, ReplicaStatus
from rocket.errors import in_words
from rocket.routing import status_table
from rocket.routing.connections import CONNECT_TIMEOUT_S, ReplicaConnection, connect_to_replica
from rocket.routing.epochs import reign_of
from rocket.routing.failures import REFUSED
from rocket.routing.waiting import Waiting

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rocket.consistency import Board

_ANSWER_TIMEOUT_S = 1.0
"""A node that takes longer to say where it is, is out of reach."""

_REPLICA_STATUS = """
    SELECT pg_is_in_recovery() AS in_recovery,
           pg_last_wal_replay_lsn() AS replay_lsn,
           pg_last_wal_receive_lsn() AS receive_lsn,
           EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming') AS streaming,
           (SELECT epoch FROM epochs ORDER BY timeline DESC LIMIT 1) AS epoch
"""

_log = logging.getLogger("rocket.observer")


class _OutOfReach(Exception):
    """A node did not answer, or not as what it should be."""


class _Reach:
    """Says once, not at every beat, that a node is lost or found again."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lost = False

    def found(self, what: object) -> None:
        if self._lost:
            _log.info("%s is back: %s", self.name, what)
        self._lost = False

    def lost(self, why: Exception) -> None:
        if not self._lost:
            foreseen = isinstance(why, (_OutOfReach, *REFUSED))
            _log.warning("%s is out of reach: %s", self.name, in_words(why), exc_info=None if foreseen else why)
        self._lost = True


class ReplicaWatch:
    """Owns the observing connection to one replica, and its status on the board."""

    def __init__(self, name: str, dsn: str, board: Board) -> None:
        self.name = name
        self._dsn = dsn
        self._board = board
        self._connection: ReplicaConnection | None = None
        self._reach = _Reach(name)

    async def observe(self) -> bool:
        """Publish the replica's status, or take it away and return False if it does not answer as a replica."""
        try:
            status = await self._ask()
        except Exception as error:  # noqa: BLE001 - one node never ends the observation of the others
            self._board.forget(self.name)
            self._reach.lost(error)
            self.close()
            return False
        self._board.publish(status)
        self._reach.found(f"replay LSN {status.replay_lsn}")
        return True

    async def _ask(self) -> ReplicaStatus:
        if self._connection is None or self._connection.is_closed():
            # Whatever was known belongs to a connection, and so perhaps to an incarnation, that has ended.
            self._board.forget(self.name)
            self._connection = await connect_to_replica(self._dsn)
            if self._connection.incarnation is None:
                _log.warning(
                    "%s hides its startup process (needs pg_read_all_stats, without a pooler in between): "
                    "it will not be read from",
                    self.name,
                )
        asked_at = time.monotonic()
        row = await self._connection.fetchrow(_REPLICA_STATUS, timeout=_ANSWER_TIMEOUT_S)
        if row is None or not row["in_recovery"] or row["replay_lsn"] is None:
            raise _OutOfReach("it is not a replica")
        receive_lsn = row["receive_lsn"]
        return ReplicaStatus(
            name=self.name,
            replay_lsn=Lsn.from_wire(row["replay_lsn"]),
            incarnation=self._connection.incarnation,
            observed_at=asked_at,
            receive_lsn=None if receive_lsn is None else Lsn.from_wire(receive_lsn),
            streaming=row["streaming"],
            epoch=None if row["epoch"] is None else Epoch(row["epoch"]),
        )

    def close(self) -> None:
        """Drop the connection."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


class PrimaryWatch:
    """Owns the observing connection to the primary; also the one that writes `replica_statuses`."""

    def __init__(self, dsn: str, board: Board) -> None:
        self._dsn = dsn
        self._board = board
        self._connection: asyncpg.Connection[Any] | None = None
        self._elected = False
        self._reach = _Reach("primary")

    async def observe(self) -> None:
        """Publish the primary's status and write the replicas' to the table."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S + _ANSWER_TIMEOUT_S):
                await self._ask_and_record()
        except Exception as error:  # noqa: BLE001 - as above
            self._board.lose_primary()
            self._reach.lost(error)
            self.close()

    async def _ask_and_record(self) -> None:
        if self._connection is None or self._connection.is_closed():
            self._elected = False
            self._connection = await asyncpg.connect(
                self._dsn,
                timeout=CONNECT_TIMEOUT_S,
                server_settings={"application_name": "rocket observer"},
            )
        asked_at = time.monotonic()
        reign = await reign_of(self._connection)
        self._board.publish_primary(PrimaryStatus(reign.flush_lsn, asked_at, reign.epoch))
        self._reach.found(f"flush LSN {reign.flush_lsn}")
        self._elected = self._elected or await status_table.elect(self._connection)
        if self._elected:
            await status_table.record(self._connection, self._board.replicas)

    def close(self) -> None:
        """Drop the connection, and with it the right to write the table."""
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


class Observer:
    """Keeps a board up to date: one watch for each node, each with a beat of its own."""

    def __init__(self, primary: str, replicas: Mapping[str, str], board: Board, *, interval_s: float) -> None:
        self.waiting = Waiting()
        """Brings what it sees to those who wait for it."""
        self.board = board
        self._interval_s = interval_s
        self._primary = PrimaryWatch(primary, board)
        self._replicas = [ReplicaWatch(name, dsn, board) for name, dsn in replicas.items()]

    async def run(self) -> None:
        """Observe until cancelled. A node out of reach holds up no other, and never ends it."""
        try:
            async with asyncio.TaskGroup() as group:
                for replica in self._replicas:
                    group.create_task(self._watch(replica), name=f"watch {replica.name}")
                group.create_task(self._watch_primary(), name="watch primary")
        finally:
            self.close()

    async def run_once(self) -> None:
        """Observe every replica once, all at the same time, and then the primary."""
        if self.board.epoch is None:
            await self._primary.observe()  # its reign has a name before replicas are asked for it
        await asyncio.gather(*(replica.observe() for replica in self._replicas))
        await self._primary.observe()

    def close(self) -> None:
        """Drop every connection."""
        for replica in self._replicas:
            replica.close()
        self._primary.close()

    async def _watch(self, replica: ReplicaWatch) -> None:
        while True:
            if await replica.observe():
                self.waiting.bring_news()
                await self.waiting.pause(replica.name, self._interval_s)
            else:
                await asyncio.sleep(self._interval_s)

    async def _watch_primary(self) -> None:
        while True:
            await self._primary.observe()
            await asyncio.sleep(self._interval_s)

"""The router: each write to the primary, each read to a replica that has replayed what it must see."""

from __future__ import annotations

import asyncio
import enum
import logging
import random
import time
from typing import TYPE_CHECKING, Generic, Self, TypeVar, cast

from rocket.consistency import Board, Lsn, Policy, Reason, choose
from rocket.errors import Unavailable, in_words
from rocket.routing import status_table
from rocket.routing.answer import PRIMARY, Answer
from rocket.routing.connections import NodePool, throw_away
from rocket.routing.failures import REFUSED, speaks_against_node
from rocket.routing.limits import Limits
from rocket.routing.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Mapping

    import asyncpg

    from rocket.consistency import ReplicaStatus
    from rocket.routing.connections import ReplicaConnection, Work
    from rocket.routing.floors import FloorStore

ResultT = TypeVar("ResultT")
SubjectT = TypeVar("SubjectT")

_IS_PRIMARY = "SELECT pg_current_wal_flush_lsn()"
"""Fails on a server that is not the primary."""

_log = logging.getLogger("rocket.router")


class Routing(enum.StrEnum):
    """How reads are routed. Only the first keeps the guarantee; the others are there to compare it with."""

    NEVER_STALE = "never-stale"
    ARTICLE = "article"
    """As published: floor taken inside the transaction, replicas looked up in `replica_statuses`."""
    RANDOM = "random"
    """Any replica."""
    PRIMARY = "primary"
    """No replica."""


class Router(Generic[SubjectT]):
    """Sends work to the primary or to a replica, so that no read is stale.

    Work is a coroutine function that is given an asyncpg connection. It may be run more than once, so it must
    keep its effects inside the database. Reads run on connections in which every transaction is read-only.

    Statuses come from `board`, which an `Observer` keeps; without one every read goes to the primary.
    """

    def __init__(
        self,
        primary: NodePool,
        replicas: Mapping[str, NodePool],
        floors: FloorStore[SubjectT],
        board: Board,
        *,
        policy: Policy,
        limits: Limits,
        routing: Routing,
    ) -> None:
        self.board = board
        self.policy = policy
        self.routing = routing
        self._primary = primary
        self._replicas = replicas
        self._floors = floors
        self._limits = limits
        self._writer = Writer(primary, floors, limits)

    @classmethod
    async def open(
        cls,
        primary: str,
        replicas: Mapping[str, str],
        floors: FloorStore[SubjectT],
        board: Board,
        *,
        policy: Policy | None = None,
        limits: Limits | None = None,
        routing: Routing = Routing.NEVER_STALE,
    ) -> Self:
        """Make a router for a primary and for replicas by name, each given as a DSN.

        Connections are opened when they are needed: nodes may be down. Close it with `aclose`, or use it as
        an asynchronous context manager.
        """
        limits = limits or Limits()
        return cls(
            await NodePool.to_primary(PRIMARY, primary, size=limits.connections),
            {
                name: await NodePool.to_replica(name, dsn, size=limits.connections)
                for name, dsn in replicas.items()
            },
            floors,
            board,
            policy=policy or Policy(),
            limits=limits,
            routing=routing,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection."""
        pools = (*self._replicas.values(), self._primary)
        await asyncio.gather(*(pool.close(self._limits.close_s) for pool in pools))

    @property
    def pools(self) -> list[NodePool]:
        """The connections to each node, the primary's first."""
        return [self._primary, *self._replicas.values()]

    async def primary_answers(self) -> bool:
        """Tell whether the primary takes statements now."""
        try:
            async with asyncio.timeout(self._limits.attempt_s), self._primary.lease() as connection:
                await connection.execute(_IS_PRIMARY)
        except REFUSED:
            return False
        return True

    async def write(self, work: Work[ResultT], *, subject: SubjectT) -> Answer[ResultT]:
        """Run `work` in a transaction on the primary, on behalf of `subject`, whose next reads will see it.

        Serialization failures and deadlocks are tried again. Raise `Unavailable` when nothing was written and
        `OutcomeUnknown` when that cannot be told; what `work` raises rolls back and is raised as it is.
        """
        return await self._writer.write(work, subject, floor_inside=self.routing is Routing.ARTICLE)

    async def read(self, work: Work[ResultT], *, subject: SubjectT) -> Answer[ResultT]:
        """Run `work` on a node that shows every write of `subject` that was acknowledged before now.

        Raise `Unavailable` if no such node answers in time; what `work` raises is raised as it is.
        """
        try:
            async with asyncio.timeout(self._limits.read_s):
                match self.routing:
                    case Routing.NEVER_STALE:
                        return await self._read_never_stale(work, subject)
                    case Routing.ARTICLE:
                        return await self._read_as_published(work, subject)
                    case Routing.RANDOM:
                        return await self._read_unchecked(work, list(self._replicas), None)
                    case Routing.PRIMARY:
                        return await self._read_on_primary(work, Reason.ASKED, None)
        except TimeoutError:
            raise Unavailable(f"no node answered within {self._limits.read_s:g} s") from None

    async def _read_never_stale(self, work: Work[ResultT], subject: SubjectT) -> Answer[ResultT]:
        floor = await self._look_up(subject)
        if floor is None or floor == Lsn.UNKNOWN:
            reason = Reason.NO_FLOOR if floor is None else Reason.WRITE_IN_PROGRESS
            return await self._read_on_primary(work, reason, floor)
        failed: set[str] = set()
        deadline = time.monotonic() + self._limits.read_s
        while len(failed) < self._limits.replicas_tried:
            choice = choose(
                floor,
                self.board,
                self.policy,
                now=time.monotonic(),
                start=random.getrandbits(16),
                load=self._in_use,
                without=failed,
            )
            if choice.status is None:
                return await self._read_on_primary(work, choice.reason, floor)
            name = choice.status.name
            try:
                value = await self._try_replica(name, work, choice.status, deadline)
            except _NodeFailed as failure:
                _log.info("%s failed a read, trying elsewhere: %s", name, failure)
                failed.add(name)
            else:
                return Answer(value, name, choice.reason, floor)
        return await self._read_on_primary(work, Reason.REPLICAS_FAILED, floor)

    async def _read_as_published(self, work: Work[ResultT], subject: SubjectT) -> Answer[ResultT]:
        floor = await self._look_up(subject)
        if floor is None:
            return await self._read_on_primary(work, Reason.NO_FLOOR, None)
        names = await self._on_primary(lambda primary: status_table.names_caught_up(primary, floor))
        if not names:
            return await self._read_on_primary(work, Reason.NOT_CAUGHT_UP, floor)
        return await self._read_unchecked(work, names, floor)

    async def _read_unchecked(self, work: Work[ResultT], names: list[str], floor: Lsn | None) -> Answer[ResultT]:
        if not names:
            return await self._read_on_primary(work, Reason.NO_STATUS, floor)
        name = random.choice(names)  # noqa: S311
        try:
            deadline = time.monotonic() + self._limits.read_s
            return Answer(await self._try_replica(name, work, None, deadline), name, Reason.UNCHECKED, floor)
        except _NodeFailed as failure:
            _log.info("%s failed a read, trying elsewhere: %s", name, failure)
            return await self._read_on_primary(work, Reason.REPLICAS_FAILED, floor)

    async def _try_replica(
        self, name: str, work: Work[ResultT], status: ReplicaStatus | None, deadline: float
    ) -> ResultT:
        """Run work on a replica, on a connection that `status` vouches for; raise `_NodeFailed` if it fails.

        Takes no more than half of the time that is left, so that there is some for another node.
        """
        pool = self._replicas.get(name)
        if pool is None:
            raise _NodeFailed("it is not one of this router's replicas")
        try:
            attempt_s = min(self._limits.attempt_s, (deadline - time.monotonic()) / 2)
            async with asyncio.timeout(attempt_s), pool.lease() as connection:
                if status is not None:
                    _refuse_other_incarnation(connection, status)
                return await work(connection)
        except Exception as error:
            if speaks_against_node(error):
                raise _NodeFailed(in_words(error)) from error
            raise

    async def _look_up(self, subject: SubjectT) -> Lsn | None:
        return await self._on_primary(lambda primary: self._floors.look_up(primary, subject))

    async def _read_on_primary(self, work: Work[ResultT], reason: Reason, floor: Lsn | None) -> Answer[ResultT]:
        return Answer(await self._on_primary(work), PRIMARY, reason, floor)

    async def _on_primary(self, work: Work[ResultT]) -> ResultT:
        """Read on the primary. A connection that a restart has ended is found out by using it: twice is enough."""
        for last in (False, True):
            try:
                async with self._primary.lease() as connection:
                    return await work(connection)
            except Exception as error:
                if not speaks_against_node(error):
                    raise
                if last or isinstance(error, TimeoutError):
                    raise Unavailable(f"the primary does not answer: {in_words(error)}") from error
        raise AssertionError("unreachable")

    def _in_use(self, name: str) -> int:
        pool = self._replicas.get(name)
        return 0 if pool is None else pool.in_use


class _NodeFailed(Exception):
    """A replica could not serve a read that another node may."""


def _refuse_other_incarnation(
    connection: asyncpg.pool.PoolConnectionProxy[asyncpg.Record], status: ReplicaStatus
) -> None:
    """Raise `_NodeFailed` unless the status was taken in the incarnation that the connection belongs to."""
    # The pool's proxy shows the attributes of the connection that it stands for.
    inner = cast("ReplicaConnection", connection)
    if status.vouches_for(inner.incarnation):
        return
    if inner.opened_at < status.observed_at:
        # Another life was seen after it was opened: its own is over, whatever the network still pretends.
        throw_away(connection)
        raise _NodeFailed("the pooled connection is of an earlier incarnation")
    raise _NodeFailed("it has restarted since it was last observed")

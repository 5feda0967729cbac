"""The router: each write to the primary, each read to a replica that has replayed what it must see."""

from __future__ import annotations

import asyncio
import enum
import logging
import random
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, Self, TypeVar, cast

from rocket.consistency import (
    NODE_NAME,
    Board,
    Choice,
    Lsn,
    Policy,
    Reason,
    SessionToken,
    choose,
    worth_waiting_for,
)
from rocket.errors import InvalidToken, Unavailable, in_words
from rocket.routing import bounds, status_table
from rocket.routing.answer import PRIMARY, Answer
from rocket.routing.connections import NodePool
from rocket.routing.epochs import checked, epoch_of
from rocket.routing.failures import REFUSED, speaks_against_node
from rocket.routing.gate import Gate, Overloaded
from rocket.routing.limits import Limits
from rocket.routing.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from rocket.consistency import Epoch, Incarnation, ReplicaStatus
    from rocket.routing.connections import Connection, ReplicaConnection, Work
    from rocket.routing.floors import FloorStore
    from rocket.routing.waiting import Waiting

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
        waiting: Waiting | None,
        limits: Limits,
        routing: Routing,
    ) -> None:
        self.board = board
        self.policy = policy
        self.routing = routing
        self._primary = primary
        self._replicas = replicas
        self._floors = floors
        self._waiting = waiting
        self._limits = limits
        self._primary_reads = Gate("a read on the primary", width=limits.primary_reads, queue=limits.queue)
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
        waiting: Waiting | None = None,
        limits: Limits | None = None,
        routing: Routing = Routing.NEVER_STALE,
    ) -> Self:
        """Make a router for a primary and for replicas by name, each given as a DSN.

        `waiting` is that of the observer which keeps the board; without it no read waits for a replica.
        Connections are opened when they are needed: nodes may be down. Close it with `aclose`, or use it as
        an asynchronous context manager. Raise `ValueError` for a name that a token cannot hold.
        """
        for name in replicas:
            if name == PRIMARY or not NODE_NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} is no name for a replica: 1 to 63 of A-Z a-z 0-9 _ . - and not {PRIMARY!r}"
                )
        limits = limits or Limits()
        return cls(
            await NodePool.to_primary(PRIMARY, primary, limits),
            {name: await NodePool.to_replica(name, dsn, limits) for name, dsn in replicas.items()},
            floors,
            board,
            policy=policy or Policy(),
            waiting=waiting,
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

    async def write(
        self, work: Work[ResultT], *, subject: SubjectT, token: SessionToken | None = None
    ) -> Answer[ResultT]:
        """Run `work` in a transaction on the primary, on behalf of `subject`, whose next reads will see it.

        Serialization failures and deadlocks are tried again. Raise `Unavailable` when nothing was written,
        `OutcomeUnknown` when that cannot be told, and `InvalidToken`; what `work` raises rolls back and is raised
        as it is.
        """
        self._refuse_lost_primary()
        answer = await self._writer.write(work, subject, token, floor_inside=self.routing is Routing.ARTICLE)
        return answer if self.routing is Routing.NEVER_STALE else replace(answer, token=None)

    async def read(
        self, work: Work[ResultT], *, subject: SubjectT, token: SessionToken | None = None
    ) -> Answer[ResultT]:
        """Run `work` on a node that shows every acknowledged write, and all that earlier reads have shown.

        With the session's token that is what the session wrote and read; without one it is what `subject` wrote,
        for which the primary has to be asked. Raise `Unavailable` if no such node answers in time, and
        `InvalidToken`; what `work` raises is raised as it is.
        """
        deadline = time.monotonic() + self._limits.read_s
        try:
            async with asyncio.timeout(self._limits.read_s):
                match self.routing:
                    case Routing.NEVER_STALE:
                        return await self._read_never_stale(work, subject, token, deadline)
                    case Routing.ARTICLE:
                        return await self._read_as_published(work, subject, deadline)
                    case Routing.RANDOM:
                        return await self._read_unchecked(work, list(self._replicas), deadline)
                    case Routing.PRIMARY:
                        value = await self._on_primary(work)
                        return Answer(value, PRIMARY, Reason.ASKED)
        except TimeoutError:
            raise Unavailable(f"no node answered within {self._limits.read_s:g} s") from None

    async def _read_never_stale(
        self, work: Work[ResultT], subject: SubjectT, token: SessionToken | None, deadline: float
    ) -> Answer[ResultT]:
        if token is None:
            floor, epoch = await self._look_up(subject)
            if floor is None or floor == Lsn.UNKNOWN:
                reason = Reason.NO_FLOOR if floor is None else Reason.WRITE_IN_PROGRESS
                return await self._read_on_primary(work, subject, reason, None)
            token = SessionToken(epoch, floor)
        failed: set[str] = set()
        while len(failed) < self._limits.replicas_tried:
            choice = await self._choice_after_waiting(token) if not failed else self._choice(token, failed)
            if choice.status is None:
                return await self._read_on_primary(work, subject, choice.reason, token)
            try:
                value, token = await self._read_on_replica(choice.status, work, token, deadline)
            except _NodeFailed as failure:
                _log.info("%s failed a read, trying elsewhere: %s", choice.status.name, failure)
                failed.add(choice.status.name)
            else:
                return Answer(value, choice.status.name, choice.reason, token)
        return await self._read_on_primary(work, subject, Reason.REPLICAS_FAILED, token)

    def _choice(self, token: SessionToken, failed: Collection[str] = ()) -> Choice:
        return choose(
            token,
            self.board,
            self.policy,
            now=time.monotonic(),
            start=random.getrandbits(16),
            load=self._in_use,
            without=failed,
        )

    async def _choice_after_waiting(self, token: SessionToken) -> Choice:
        """Choose a replica; if none is caught up, but some may be in no time, wait for them a little."""
        choice = self._choice(token)
        if choice.reason is not Reason.NOT_CAUGHT_UP or self._waiting is None or not self.policy.max_wait_s:
            return choice
        names = worth_waiting_for(
            token, self.board, self.policy, now=time.monotonic(), start=random.getrandbits(16)
        )
        if not names:
            return choice

        def caught_up() -> ReplicaStatus | None:
            return self._choice(token).status

        status = await self._waiting.until(names, caught_up, self.policy.max_wait_s)
        return choice if status is None else Choice(status, Reason.WAITED)

    async def _read_on_replica(
        self, status: ReplicaStatus, work: Work[ResultT], token: SessionToken, deadline: float
    ) -> tuple[ResultT, SessionToken]:
        """Run work on a connection that `status` vouches for; return the session's next token with the result."""

        async def bounded(replica: Connection) -> tuple[ResultT, SessionToken]:
            incarnation = _vouched_for(replica, status)
            value = await work(replica)
            bound = await bounds.shown_by_replica(replica, token.epoch)
            return value, token.after_replica_read(status.name, incarnation, bound)

        return await self._try_replica(status.name, bounded, deadline)

    async def _read_on_primary(
        self, work: Work[ResultT], subject: SubjectT, reason: Reason, token: SessionToken | None
    ) -> Answer[ResultT]:
        async def bounded(primary: Connection) -> Answer[ResultT]:
            epoch = epoch_of(primary)
            current = await checked(token, primary)
            if current is None:
                current = SessionToken(epoch, Lsn(0))
            elif current.node is not None:
                await self._floors.wait_for_writes(primary, subject)
            value = await work(primary)
            flush_lsn = await bounds.shown_by_primary(primary)
            if current.is_beyond(flush_lsn):
                raise InvalidToken("the token lies beyond all that the primary has written")
            return Answer(value, PRIMARY, reason, current.after_primary_read(flush_lsn))

        return await self._on_primary(bounded)

    async def _read_as_published(self, work: Work[ResultT], subject: SubjectT, deadline: float) -> Answer[ResultT]:
        floor, _ = await self._look_up(subject)
        names = (
            []
            if floor is None
            else await self._on_primary(lambda primary: status_table.names_caught_up(primary, floor))
        )
        return await self._read_unchecked(work, names, deadline)

    async def _read_unchecked(self, work: Work[ResultT], names: list[str], deadline: float) -> Answer[ResultT]:
        if not names:
            return Answer(await self._on_primary(work), PRIMARY, Reason.NOT_CAUGHT_UP)
        name = random.choice(names)  # noqa: S311
        try:
            return Answer(await self._try_replica(name, work, deadline), name, Reason.UNCHECKED)
        except _NodeFailed as failure:
            _log.info("%s failed a read, trying elsewhere: %s", name, failure)
            return Answer(await self._on_primary(work), PRIMARY, Reason.REPLICAS_FAILED)

    async def _try_replica(self, name: str, work: Work[ResultT], deadline: float) -> ResultT:
        """Run work on a replica; raise `_NodeFailed` if that speaks against it.

        Takes no more than half of the time that is left, so that there is some for another node.
        """
        pool = self._replicas.get(name)
        if pool is None:
            raise _NodeFailed("it is not one of this router's replicas")
        try:
            attempt_s = min(self._limits.attempt_s, (deadline - time.monotonic()) / 2)
            async with asyncio.timeout(attempt_s), pool.lease() as connection:
                return await work(connection)
        except Exception as error:
            if speaks_against_node(error):
                raise _NodeFailed(in_words(error)) from error
            raise

    async def _look_up(self, subject: SubjectT) -> tuple[Lsn | None, Epoch]:
        async def look_up(primary: Connection) -> tuple[Lsn | None, Epoch]:
            return await self._floors.look_up(primary, subject), epoch_of(primary)

        return await self._on_primary(look_up)

    async def _on_primary(self, work: Work[ResultT]) -> ResultT:
        """Read on the primary; try twice, since a connection that a restart has ended shows that only in use."""
        self._refuse_lost_primary()
        for last in (False, True):
            try:
                async with self._primary_reads.passed(), self._primary.lease() as connection:
                    return await work(connection)
            except Exception as error:
                if not speaks_against_node(error):
                    raise
                if last or isinstance(error, TimeoutError | Overloaded):
                    raise Unavailable(f"the primary does not answer: {in_words(error)}") from error
        raise AssertionError("unreachable")

    def _refuse_lost_primary(self) -> None:
        """Raise `Unavailable` at once where the observer has found the primary out of reach."""
        if self.board.primary_is_lost:
            raise Unavailable("the primary is out of reach")

    def _in_use(self, name: str) -> int:
        pool = self._replicas.get(name)
        return 0 if pool is None else pool.in_use


class _NodeFailed(Exception):
    """A replica could not serve a read that another node may."""


def _vouched_for(connection: Connection, status: ReplicaStatus) -> Incarnation:
    """Return the connection's incarnation if the status was taken in the same one, else raise `_NodeFailed`."""
    # The pool's proxy shows the attributes of the connection that it stands for.
    inner = cast("ReplicaConnection", connection)
    if inner.incarnation is not None and status.vouches_for(inner.incarnation):
        return inner.incarnation
    if inner.opened_at < status.observed_at:
        # Another life was seen after it was opened: its own is over, whatever the network still pretends.
        connection.terminate()
        raise _NodeFailed("the pooled connection is of an earlier incarnation")
    raise _NodeFailed("it has restarted since it was last observed")

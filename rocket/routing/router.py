"""The router: each write to the primary, each read to a replica that has replayed what it must see."""

from __future__ import annotations

import asyncio
import enum
import logging
import random
import time
from typing import TYPE_CHECKING, Generic, Self, TypeAlias, TypeVar

from rocket.consistency import (
    Board,
    Choice,
    Lsn,
    Policy,
    Reason,
    SessionToken,
    choose,
    merged,
    worth_waiting_for,
)
from rocket.errors import InvalidToken, Unavailable, in_words
from rocket.routing import bounds, status_table
from rocket.routing.answer import Answer, Role
from rocket.routing.connections import behind
from rocket.routing.epochs import standing_of
from rocket.routing.failures import REFUSED, NotAsObserved, speaks_against_node
from rocket.routing.gate import Gate, Overloaded
from rocket.routing.limits import Limits
from rocket.routing.nodes import Nodes
from rocket.routing.writer import FloorTaken, Writer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence

    from rocket.consistency import Epoch, PrimaryStatus, ReplicaStatus
    from rocket.routing.connections import Connection, NodePool, Work
    from rocket.routing.floors import FloorStore
    from rocket.routing.waiting import Waiting

ResultT = TypeVar("ResultT")
SubjectT = TypeVar("SubjectT")

_IS_PRIMARY = "SELECT pg_current_wal_flush_lsn()"
"""Fails on a server that is not the primary."""

Tokens: TypeAlias = "SessionToken | Iterable[SessionToken] | None"
"""What a session brings: its token, or several where it has concurrent requests."""

_log = logging.getLogger("rocket.router")


class Routing(enum.StrEnum):
    """How reads are routed. Only the first keeps the guarantee; the others are there to compare it with.

    Nor does it cover what was written under another one, which records no floor that holds.
    """

    NEVER_STALE = "never-stale"
    ARTICLE = "article"
    """As published: floor taken inside the transaction, replicas looked up in `replica_statuses`."""
    RANDOM = "random"
    """Any replica."""
    PRIMARY = "primary"
    """No replica."""


_FLOOR_TAKEN = {
    Routing.NEVER_STALE: FloorTaken.AFTER_COMMIT,
    Routing.ARTICLE: FloorTaken.INSIDE,
    Routing.RANDOM: FloorTaken.NEVER,
    Routing.PRIMARY: FloorTaken.NEVER,
}


class Router(Generic[SubjectT]):
    """Sends work to the primary or to a replica, so that no read is stale.

    Work is a coroutine function that is given an asyncpg connection. It may be run more than once, so it must
    keep its effects inside the database. Reads run on connections in which every transaction is read-only.

    Statuses come from `board`, which an `Observer` keeps. It says which node is the primary; without statuses of
    replicas every read goes there.
    """

    def __init__(
        self,
        nodes: Nodes,
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
        self._nodes = nodes
        self._floors = floors
        self._waiting = waiting
        self._limits = limits
        self._primary_reads = Gate("a read on the primary", width=limits.primary_reads, queue=limits.queue)
        self._writer = Writer(nodes, floors, limits)

    @classmethod
    async def open(
        cls,
        nodes: Mapping[str, str],
        floors: FloorStore[SubjectT],
        board: Board,
        *,
        policy: Policy | None = None,
        waiting: Waiting | None = None,
        limits: Limits | None = None,
        routing: Routing = Routing.NEVER_STALE,
    ) -> Self:
        """Make a router for nodes by name, each given as a DSN, whatever their roles are.

        `waiting` is that of the observer which keeps the board; without it no read waits for a replica.
        Connections are opened when they are needed: nodes may be down. Close it with `aclose`, or use it as
        an asynchronous context manager. Raise `ValueError` for a name that a token cannot hold.
        """
        policy, limits = policy or Policy(), limits or Limits()
        return cls(
            await Nodes.open(nodes, board, policy, limits),
            floors,
            board,
            policy=policy,
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
        await self._nodes.close()

    @property
    def pools(self) -> list[NodePool]:
        """The connections to each node."""
        return self._nodes.pools

    async def primary_answers(self) -> bool:
        """Tell whether the primary takes statements now."""
        try:
            async with asyncio.timeout(self._limits.attempt_s), self._nodes.primary() as (connection, _):
                await connection.execute(_IS_PRIMARY)
        except (Unavailable, NotAsObserved, *REFUSED):
            return False
        return True

    async def write(self, work: Work[ResultT], *, subject: SubjectT, token: Tokens = None) -> Answer[ResultT]:
        """Run `work` in a transaction on the primary, on behalf of `subject`, whose next reads will see it.

        Serialization failures and deadlocks are tried again. Raise `Unavailable` when nothing was written,
        `OutcomeUnknown` when that cannot be told, or when another primary may have been promoted meanwhile, and
        `InvalidToken`; what `work` raises rolls back and is raised
        as it is.
        """
        return await self._writer.write(work, subject, _in_order(token), _FLOOR_TAKEN[self.routing])

    async def read(self, work: Work[ResultT], *, subject: SubjectT, token: Tokens = None) -> Answer[ResultT]:
        """Run `work` on a node that shows every acknowledged write, and all that earlier reads have shown.

        With the session's token that is what the session wrote and read; without one it is what `subject` wrote,
        for which the primary has to be asked. Raise `Unavailable` if no such node answers in time, and
        `InvalidToken`; what `work` raises is raised as it is.
        """
        deadline = time.monotonic() + self._limits.read_s
        match self.routing:
            case Routing.NEVER_STALE:
                return await self._read_never_stale(work, subject, _in_order(token), deadline)
            case Routing.ARTICLE:
                return await self._read_as_published(work, subject, deadline)
            case Routing.RANDOM:
                return await self._read_unchecked(work, self._nodes.names_but_primary, deadline)
            case Routing.PRIMARY:
                return await self._read_on_primary_unchecked(work, Reason.ASKED, deadline)

    async def _read_never_stale(
        self, work: Work[ResultT], subject: SubjectT, tokens: Sequence[SessionToken], deadline: float
    ) -> Answer[ResultT]:
        if not tokens:
            floor, epoch = await self._look_up(subject, deadline)
            if floor is None or floor == Lsn.UNKNOWN:
                reason = Reason.NO_FLOOR if floor is None else Reason.WRITE_IN_PROGRESS
                return await self._read_on_primary(work, subject, reason, (), deadline)
            tokens = (SessionToken(epoch, floor),)
        token, *earlier = tokens
        if earlier:  # only a primary can tell what has become of them
            return await self._read_on_primary(work, subject, Reason.OTHER_EPOCH, tokens, deadline)
        failed: set[str] = set()
        while len(failed) < self._limits.replicas_tried:
            choice = self._choice(token, failed) if failed else await self._choice_after_waiting(token, deadline)
            if choice.status is None:
                return await self._read_on_primary(work, subject, choice.reason, tokens, deadline)
            try:
                value, next_token = await self._read_on_replica(choice.status, work, token, deadline)
            except _NodeFailed as failure:
                _log.info("%s failed a read, trying elsewhere: %s", choice.status.name, failure)
                failed.add(choice.status.name)
            else:
                return Answer(value, choice.status.name, Role.REPLICA, choice.reason, next_token)
        return await self._read_on_primary(work, subject, Reason.REPLICAS_FAILED, tokens, deadline)

    def _choice(self, token: SessionToken, failed: Collection[str] = ()) -> Choice:
        return choose(
            token,
            self.board,
            self.policy,
            now=time.monotonic(),
            start=random.getrandbits(16),
            load=self._nodes.in_use,
            without=failed,
        )

    async def _choice_after_waiting(self, token: SessionToken, deadline: float) -> Choice:
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

        wait_s = min(self.policy.max_wait_s, deadline - time.monotonic())
        status = await self._waiting.until(names, caught_up, wait_s)
        return choice if status is None else Choice(status, Reason.WAITED)

    async def _read_on_replica(
        self, status: ReplicaStatus, work: Work[ResultT], token: SessionToken, deadline: float
    ) -> tuple[ResultT, SessionToken]:
        """Run work on a connection that `status` vouches for; return the session's next token with the result."""

        async def bounded(replica: Connection) -> tuple[ResultT, SessionToken]:
            assert status.incarnation is not None  # noqa: S101 - it was compared with the connection's
            value, said = await bounds.with_what_was_said(work, replica)
            bound = bounds.shown_by_replica(said, token.epoch)
            return value, token.after_replica_read(status.name, status.incarnation, bound)

        return await self._try_replica(status.name, status, bounded, deadline)

    async def _read_on_primary(
        self,
        work: Work[ResultT],
        subject: SubjectT,
        reason: Reason,
        tokens: Sequence[SessionToken],
        deadline: float,
    ) -> Answer[ResultT]:
        async def bounded(primary: Connection, status: PrimaryStatus) -> Answer[ResultT]:
            epoch = status.epoch
            standing = await standing_of(tokens, primary, epoch)
            if any(token.node is not None for token in tokens):
                await self._floors.wait_for_writes(primary, subject)
            value, said = await bounds.with_what_was_said(work, primary)
            flush_lsn = bounds.shown_by_primary(said, epoch)
            token = standing.token or SessionToken(epoch, Lsn(0))
            if token.is_beyond(flush_lsn):
                raise InvalidToken("the token lies beyond all that the primary has written")
            token = token.after_primary_read(flush_lsn)
            return Answer(value, status.name, Role.PRIMARY, reason, token, standing.lost)

        return await self._on_primary(bounded, deadline)

    async def _read_on_primary_unchecked(
        self, work: Work[ResultT], reason: Reason, deadline: float
    ) -> Answer[ResultT]:
        async def unchecked(primary: Connection, status: PrimaryStatus) -> Answer[ResultT]:
            return Answer(await work(primary), status.name, Role.PRIMARY, reason)

        return await self._on_primary(unchecked, deadline)

    async def _read_as_published(self, work: Work[ResultT], subject: SubjectT, deadline: float) -> Answer[ResultT]:
        floor, _ = await self._look_up(subject, deadline)
        names = (
            []
            if floor is None
            else await self._on_primary(lambda primary, _: status_table.names_caught_up(primary, floor), deadline)
        )
        return await self._read_unchecked(work, names, deadline)

    async def _read_unchecked(self, work: Work[ResultT], names: list[str], deadline: float) -> Answer[ResultT]:
        if not names:
            return await self._read_on_primary_unchecked(work, Reason.NOT_CAUGHT_UP, deadline)
        name = random.choice(names)  # noqa: S311
        try:
            value = await self._try_replica(name, None, work, deadline)
        except _NodeFailed as failure:
            _log.info("%s failed a read, trying elsewhere: %s", name, failure)
            return await self._read_on_primary_unchecked(work, Reason.REPLICAS_FAILED, deadline)
        return Answer(value, name, Role.REPLICA, Reason.UNCHECKED)

    async def _try_replica(
        self,
        name: str,
        status: ReplicaStatus | None,
        work: Callable[[Connection], Awaitable[ResultT]],
        deadline: float,
    ) -> ResultT:
        """Run work on a replica that `status` vouches for; raise `_NodeFailed` if what happens speaks against it.

        Takes no more than half of the time that is left, so that there is some for another node.
        """
        try:
            attempt_s = min(self._limits.attempt_s, (deadline - time.monotonic()) / 2)
            async with asyncio.timeout(attempt_s), self._nodes.replica(name, status) as connection:
                return await work(connection)
        except Exception as error:
            if speaks_against_node(error):
                raise _NodeFailed(in_words(error)) from error
            raise

    async def _look_up(self, subject: SubjectT, deadline: float) -> tuple[Lsn | None, Epoch]:
        async def look_up(primary: Connection, status: PrimaryStatus) -> tuple[Lsn | None, Epoch]:
            floor = await self._floors.look_up(primary, subject)
            behind(primary).left_clean = True
            return floor, status.epoch

        return await self._on_primary(look_up, deadline)

    async def _on_primary(
        self, work: Callable[[Connection, PrimaryStatus], Awaitable[ResultT]], deadline: float
    ) -> ResultT:
        """Read on the primary; raise `Unavailable` if it does not answer by then."""
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await self._on_primary_in_time(work)
        except TimeoutError:
            raise Unavailable(f"no node answered within {self._limits.read_s:g} s") from None

    async def _on_primary_in_time(
        self, work: Callable[[Connection, PrimaryStatus], Awaitable[ResultT]]
    ) -> ResultT:
        """Try twice, since a connection that a restart has ended shows that only in use."""
        for last in (False, True):
            try:
                self._nodes.primary_in_office()  # before anything is waited for
                async with self._primary_reads, self._nodes.primary() as (connection, status):
                    result = await work(connection, status)
                self._nodes.must_still_reign(status.epoch)
            except Exception as error:
                if not speaks_against_node(error):
                    raise
                if last or isinstance(error, TimeoutError | Overloaded):
                    raise Unavailable(f"the primary does not answer: {in_words(error)}") from error
            else:
                return result
        raise AssertionError("unreachable")


class _NodeFailed(Exception):
    """A replica could not serve a read that another node may."""


def _in_order(tokens: Tokens) -> Sequence[SessionToken]:
    """Return a session's tokens, those of the latest reign merged to the first one; raise `InvalidToken`."""
    if tokens is None:
        return ()
    given = (tokens,) if isinstance(tokens, SessionToken) else tuple(tokens)
    if len(given) < 2:  # noqa: PLR2004 - nothing to merge
        return given
    try:
        latest, earlier = merged(given)
    except ValueError as error:
        raise InvalidToken(str(error)) from None
    return () if latest is None else (latest, *earlier)
